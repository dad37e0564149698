"""`jaxops doctor`: what is sound passes, and what is not is found."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import pytest

import jaxops.ops.rms_norm  # noqa: F401  (the module, which the function of that name hides)
from jaxops.autodiff import Rules
from jaxops.workbench import devices, doctor
from jaxops.workbench.call import operators
from jaxops.workbench.command import main
from jaxops.workbench.doctor import Finding


@pytest.mark.parametrize(
    ("version", "wanted", "holds"),
    [
        ("0.12.0.1", "<0.13,>=0.12", True),
        ("0.13.0", "<0.13,>=0.12", False),
        ("0.13.0rc1", "<0.13,>=0.12", False),
        ("0.11.9", "<0.13,>=0.12", False),
        ("0.12", ">=0.12.0", True),
        ("0.0.50.1", "==0.0.50.*", True),
        ("0.0.51", "==0.0.50.*", False),
        ("2.5.5", "!=2.5.5", False),
        ("10.0", ">9.1", True),
        ("9.1", ">9.1", False),
        ("0.12.0.1", "<=0.12.0.1,>=0.11.2", True),
        ("1.0", "", True),
    ],
)
def test_versions_within_a_range(version, wanted, holds):
    assert doctor.within(version, wanted) is holds


def test_the_ranges_are_those_the_distributions_state():
    assert doctor.required("jax", "jaxops") == "<0.13,>=0.12"
    assert doctor.required("libtpu", "jax").startswith("==0.0.")
    assert doctor.required("no-such-thing", "jaxops") == ""


def test_a_version_out_of_range_fails_and_an_absent_one_too(monkeypatch):
    have = {"jax": "0.13.1", "flax": None, "libtpu": "0.0.1"}
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: have.get(name, real(name)) if name in have else real(name))
    found = {finding.about: finding for finding in doctor.versions()}
    assert found["jax"].level == "FAIL" and "jaxops needs <0.13,>=0.12" in found["jax"].found
    assert found["jax"].advice == "pip install 'jax<0.13,>=0.12'"
    assert found["flax"] == Finding("flax", "FAIL", "not installed", "pip install flax")
    assert found["libtpu"].level == "FAIL" and found["numpy"].level == found["python"].level == "ok"
    assert "jax-cuda12-plugin" not in found  # optional, and absent


@pytest.mark.parametrize(
    ("name", "value", "level"),
    [
        ("JAX_PLATFORMS", "tpu", "ok"),
        ("JAX_ENABLE_X64", "1", "warning"),
        ("JAX_ENABLE_X64", "false", "ok"),
        ("JAX_DEFAULT_MATMUL_PRECISION", "highest", "ok"),
        ("XLA_PYTHON_CLIENT_MEM_FRACTION", ".75", "ok"),
        ("XLA_PYTHON_CLIENT_MEM_FRACTION", "75", "FAIL"),
        ("XLA_PYTHON_CLIENT_MEM_FRACTION", "most", "FAIL"),
        ("XLA_FLAGS", "--xla_cpu_enable_fast_math=true", "warning"),
        ("XLA_FLAGS", "--xla_force_host_platform_device_count=8", "warning"),
        ("XLA_FLAGS", "--xla_dump_to=x", "ok"),
        ("JAX_NUMPY_DTYPE_PROMOTION", "strict", "warning"),
    ],
)
def test_the_environment(name, value, level):
    (finding,) = doctor.environment({name: value, "HOME": "/"})
    assert (finding.about, finding.level, finding.found) == (name, level, value) and finding.advice


def test_a_plugin_that_is_not_used_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: "1" if name == "libtpu" else None)
    (asked,) = doctor.environment({"JAX_PLATFORMS": "cpu"})
    assert asked.level == "warning" and "libtpu is installed but not used" in asked.advice
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    (found,) = doctor.devices_found()
    assert found.level == "warning" and "libtpu is installed, but JAX found no device" in found.advice


def test_a_backend_that_does_not_start_fails_and_nothing_is_tested(monkeypatch):
    def broken():
        raise RuntimeError("Unable to initialize\nbackend 'tpu'")

    monkeypatch.setattr(devices, "at_hand", broken)
    *_, last = doctor.examine()
    assert (last.about, last.level, last.found) == ("devices", "FAIL", "Unable to initialize backend 'tpu'")


def test_the_compiler_and_its_numbers_are_tried():
    found = {finding.about: finding for finding in [*doctor.compiler(), *doctor.precision()]}
    assert set(found) == {
        "bfloat16 products",
        "float16 sums of products",
        "lax.ragged_dot",
        "float32 products",
        "bfloat16 products' sums",
        "denormal numbers",
        "bfloat16 in one program",
    }
    assert all(finding.level in ("ok", "warning") and finding.found for finding in found.values())
    assert found["float32 products"].level == "ok"  # a CPU multiplies float32 as it is


def test_coarse_products_are_told_from_fine_ones(monkeypatch):
    exact = jax.jit
    for dtype, what in ((jnp.bfloat16, "bfloat16"), (jnp.float32, None)):
        rounded = lambda a, b, dtype=dtype: jnp.dot(jnp.asarray(a, dtype), jnp.asarray(b, dtype)).astype(jnp.float32)
        monkeypatch.setattr(doctor.jax, "jit", lambda _, rounded=rounded: exact(rounded))
        finding = doctor._float32_product()
        assert (finding.level == "warning" and what in finding.found) if what else finding.level == "ok"
    monkeypatch.setattr(doctor.jax, "jit", exact)


def test_an_operator_that_is_sound_passes():
    finding = doctor._tested("rms_norm", "bfloat16")
    assert finding.level == "ok" and finding.found.startswith("XLA: value and gradients, worst relative error")


def test_an_operator_that_is_wrong_or_raises_fails(monkeypatch):
    module = sys.modules["jaxops.ops.rms_norm"]
    operator = module._OPERATOR

    def wrong(*, outputs, residuals, cotangents, **operands):
        gradients = operator.xla.backward(outputs=outputs, residuals=residuals, cotangents=cotangents, **operands)
        return {**gradients, "scale": gradients["scale"] * 1.01}

    def raises(**operands):
        raise RuntimeError("no such\n  instruction")

    faulty = dataclasses.replace(operator, xla=Rules(operator.xla.forward, wrong))
    monkeypatch.setattr(module, "_OPERATOR", faulty)
    finding = doctor._tested("rms_norm", "float32")
    assert finding.level == "FAIL" and "gradient of scale" in finding.found and "report it" in finding.advice
    monkeypatch.setattr(module, "_OPERATOR", dataclasses.replace(operator, xla=Rules(operator.xla.forward, raises)))
    finding = doctor._tested("rms_norm", "float32")
    assert finding.level == "FAIL" and "no such instruction" in finding.found


def test_what_is_not_reached_in_time_is_said():
    found = list(doctor.self_test(-1))
    assert len(found) == 2 * len(operators())
    assert all(finding.level == "warning" and finding.found == "not reached in time" for finding in found)


@pytest.mark.parametrize(("level", "code"), [("ok", 0), ("warning", 0), ("FAIL", 1)])
def test_the_command_fails_where_something_failed(level, code, capsys, monkeypatch):
    found = [Finding("python", "ok", "3.12"), Finding("something", level, "as found", "as advised")]
    monkeypatch.setattr(doctor, "examine", lambda seconds: iter(found))
    assert main(["doctor", "--json"]) == code
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] is (code == 0) and said["findings"][1]["level"] == level
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["doctor"]) == code
    out = capsys.readouterr().out
    assert "as advised" in out and f"2 findings: {level.count('warning')} warnings, {code} failures" in out


def test_a_limit_that_makes_no_sense(capsys):
    assert main(["doctor", "--seconds", "0"]) == 2
    assert "--seconds must be above 0" in capsys.readouterr().err
