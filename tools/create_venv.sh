#!/bin/sh
# create_venv.sh FOLDER: a virtual environment with Python 3.12 or newer, from PATH, else pyenv's versions, else uv.
set -eu
folder=$1
[ -x "$folder/bin/python" ] && exit 0

new_enough() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; }

for name in python3.13 python3.12 python3.14 python3 python; do
    found=$(command -v "$name" || true)
    if [ -n "$found" ] && new_enough "$found"; then exec "$found" -m venv "$folder"; fi
done
for found in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python; do
    if new_enough "$found"; then exec "$found" -m venv "$folder"; fi
done
if command -v uv >/dev/null; then exec uv venv --quiet --seed --python '>=3.12' "$folder"; fi
echo "jaxops needs Python 3.12 or newer: none was found on PATH or under pyenv's versions, and uv is not installed." >&2
exit 1
