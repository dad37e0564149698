"""The certificates in docs/ and the supervisor that writes them. `make certify` compiles; nothing is compiled here."""

import copy
import json
import sys

import pytest

from benchmarks import certify

COMMITTED = certify.DOCS / "certificates.json"
# A compiler that certifies cell 0, dies at 1, hangs at 2 and certifies the rest.
WORKER = """
import sys, time
for index in range(int(sys.argv[1]), int(sys.argv[2])):
    print("certificate begins", index, flush=True)
    if index == 1:
        print("LLVM ERROR: Cannot select: intrinsic at 0x7f at /some/where/file.cc", flush=True)
        sys.exit(134)
    if index == 2:
        time.sleep(60)
    print('certificate ends {"status": "refused", "reason": "because"}', flush=True)
"""


def test_every_chip_and_operator_has_a_certificate_and_none_failed():
    found = json.loads(COMMITTED.read_text())["cells"]
    wanted = {certify.key_of(chip, *cell) for chip in certify.CHIPS for cell in certify.cells()}
    assert found.keys() == wanted
    assert [key for key, cell in found.items() if cell["status"] == "failed"] == []


def test_the_page_is_written_from_the_json():
    assert (certify.DOCS / "certificates.md").read_text() == certify.render(json.loads(COMMITTED.read_text()))


def test_a_cell_that_turned_red_is_named():
    before = json.loads(COMMITTED.read_text())
    key = next(key for key, cell in before["cells"].items() if cell["status"] == "compiled")
    now = copy.deepcopy(before)
    now["cells"][key] = {"status": "refused", "reason": "planted"}
    assert certify.reddened(before, before) == []
    assert certify.reddened(before, now) == [f"{key}: compiled before, now refused: planted"]
    assert certify.reddened(now, before) == []


@pytest.mark.timeout(60)
def test_a_compiler_that_dies_or_hangs_costs_one_cell(monkeypatch):
    count = len(certify.cells())
    monkeypatch.setattr(certify, "worker", lambda _, start: [sys.executable, "-c", WORKER, str(start), str(count)])
    cells = list(certify.supervise("v5e", seconds=5).values())
    assert cells[1]["reason"] == "the compiler aborted: LLVM ERROR: Cannot select: intrinsic at <address> at <path>"
    assert cells[2]["reason"] == "no end after 5 s: nothing was said"
    assert [cell["reason"] for cell in cells[:1] + cells[3:]] == ["because"] * (count - 2)


def test_missing_compilers_are_named_with_what_installs_them(monkeypatch, capsys):
    monkeypatch.setitem(certify.COMPILERS, "tpu", ("tpu-compile", ("no-such-compiler",)))
    monkeypatch.setattr(sys, "argv", ["certify", "--chips", "v5e"])
    assert certify.main() == 2
    assert "(no-such-compiler): pip install 'jaxops[tpu-compile]'" in capsys.readouterr().err


def test_figures_are_read_from_what_the_compilers_print():
    printed = (
        "Resources(smem_scratch_bytes=1000, barrier_counts=Counter({Barrier(num_barriers=16, x=False): 1}))\n"
        "Resources(smem_scratch_bytes=200, barrier_counts=Counter({Barrier(num_barriers=8, x=False): 2}))\n"
        "ptxas info    : Compiling entry function 'a_mosaic_gpu_kernel' for 'sm_90a'\n"
        "    8 bytes stack frame, 24 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 1 barriers\n"
    )
    assert certify.gpu_resources(printed, 1) == {"smem_bytes": 328, "registers": 168, "spill_bytes": 24}
    call = (
        'custom_call_target="tpu_custom_call", "scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"%d"}]'
    )
    assert certify.vmem_bytes(f"{call % 4096}\n{call % 512}") == 4096
    assert certify.plain_words("Error at /a/b/c.py\n\n  0x7fff\n--------\n") == "Error at <path> <address>"
