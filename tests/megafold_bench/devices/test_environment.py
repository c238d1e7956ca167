"""Provenance and `detect_accelerator`, with and without GPUs, and what the host's files say."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from megafold_bench import environment, host
from megafold_bench.devices import Unavailable
from megafold_bench.devices.torch_facts import torch_build


def test_collect_is_json_and_gives_a_reason_for_every_null_reading():
    facts = json.loads(json.dumps(environment.collect()))
    assert set(facts) == {"gpus", "software", "source", "cpu", "host", "variables", "argv", "unavailable"}
    assert facts["software"]["python"].startswith("CPython 3.")
    assert facts["cpu"]["cores"] >= 1
    assert facts["host"]["ram_bytes"] > 1 << 28
    for path, reason in facts["unavailable"].items():
        value = facts
        for part in path.split("."):
            value = value[int(part)] if isinstance(value, list) else value[part]
        assert value is None
        assert reason


def test_collect_names_every_gpu(nvidia_gpus, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    facts = environment.collect()
    assert [gpu["uuid"] for gpu in facts["gpus"]] == [gpu.uuid for gpu in nvidia_gpus]
    assert facts["gpus"][0]["power_limit_w"] == 700.0
    assert facts["software"]["cuda_driver"] == "13.0"
    assert facts["variables"]["CUDA_VISIBLE_DEVICES"] == "1"
    assert sys.modules["pynvml"].users == 0


def test_a_missing_gpu_fact_has_its_path(nvidia_gpus, monkeypatch):
    def fails(handle):
        raise RuntimeError("Not Supported")

    monkeypatch.setattr(sys.modules["pynvml"], "nvmlDeviceGetEccMode", fails)
    facts = environment.collect()
    assert facts["gpus"][1]["ecc"] is None
    assert "Not Supported" in facts["unavailable"]["gpus.1.ecc"]


def test_amd_gpus_are_collected(amd_gpus):
    (first, second) = environment.collect()["gpus"]
    assert (first["pci_id"], first["arch"], first["partition"]) == ("0000:26:00.0", "gfx942", "SPX/NPS1")
    assert second["pci_id"] == "0000:05:00.0"


def test_variables_leave_secrets_out():
    environ = {
        "NCCL_DEBUG": "INFO",
        "TRITON_API_KEY": "x",
        "TORCH_TOKEN": "y",
        "HOME": "/root",
        "OMP_NUM_THREADS": "2",
    }
    assert host.recorded_variables(environ) == {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "2"}


def test_detect_accelerator(nvidia_gpus, monkeypatch, set_torch):
    assert environment.detect_accelerator() == "cuda"
    set_torch(None)
    assert environment.detect_accelerator() == "cpu"
    set_torch("nvidia")
    monkeypatch.setattr(environment, "DRIVER_NODES", ())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert environment.detect_accelerator() == "cpu"
    set_torch("amd")
    assert environment.detect_accelerator() == "cpu"


def test_torch_decides_where_the_library_is_mute(monkeypatch, set_torch, tmp_path):
    set_torch("nvidia")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(environment, "DRIVER_NODES", (tmp_path,))
    for available, expected in ((True, "cuda"), (False, "cpu")):
        cuda = SimpleNamespace(is_available=lambda answer=available: answer)
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
        assert environment.detect_accelerator() == expected


def test_torch_build_reads_files_only(tmp_path, monkeypatch):
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "version.py").write_text(
        "from typing import Optional\n__version__ = '2.11.0+rocm7.0'\ncuda: Optional[str] = None\n"
        "git_version = 'f00'\nhip: Optional[str] = '7.0.51831'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    build = torch_build()
    assert (build.version, build.git, build.vendor) == ("2.11.0+rocm7.0", "f00", "amd")
    (package / "version.py").write_text("def (\n")
    assert isinstance(torch_build(), Unavailable)


def _commit(folder, *arguments):
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    subprocess.run(command, check=True, capture_output=True)


def test_own_source_tells_clean_from_dirty(tmp_path, monkeypatch):
    package = tmp_path / "megafold_bench"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "host.py").write_text("")
    monkeypatch.setattr(host, "__file__", str(package / "host.py"))
    assert isinstance(host.own_source()["dirty"], Unavailable)
    _commit(tmp_path, "init")
    _commit(tmp_path, "add", ".")
    _commit(tmp_path, "commit", "-m", "x")
    clean = host.own_source()
    assert (len(clean["commit"]), clean["dirty"], clean["diff_sha256"]) == (40, False, None)
    (package / "host.py").write_text("changed\n")
    dirty = host.own_source()
    assert (dirty["commit"], dirty["dirty"], len(dirty["diff_sha256"])) == (clean["commit"], True, 64)


@pytest.mark.parametrize(
    ("line", "files", "expected"),
    [
        ("0::/a/b", {"a/b/memory.max": "max", "a/memory.max": "1000"}, 1000),
        ("0::/a/b", {"a/b/memory.max": "500", "a/memory.max": "1000"}, 500),
        ("0::/", {"memory.max": "max"}, None),
        ("0::/host/path", {"memory.max": "700"}, 700),
        ("4:memory:/x", {"memory/x/memory.limit_in_bytes": "9223372036854771712"}, None),
        ("4:cpu,memory:/x", {"memory/x/memory.limit_in_bytes": "4096"}, 4096),
    ],
)
def test_cgroup_limit(tmp_path, line, files, expected):
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text(f"7:pids:/\n{line}\n")
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    assert host.cgroup_memory_limit_bytes(root, proc) == expected


def test_no_cgroup_is_unavailable(tmp_path):
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text("0::/\n")
    assert isinstance(host.cgroup_memory_limit_bytes(tmp_path / "none", tmp_path), Unavailable)


def test_host_name_is_hashed(monkeypatch):
    monkeypatch.setattr(host.socket, "gethostname", lambda: "node17.example")
    first = host.hashed_host_name()
    assert len(first) == 12
    assert "node17" not in first
    monkeypatch.setattr(host.socket, "gethostname", lambda: "node18.example")
    assert host.hashed_host_name() != first
