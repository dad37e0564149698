"""Small operators, each as it should be (`right`) and with one mistake (`wrong`), which `jaxops verify` must find."""
