"""Each check says what is wrong and what to do."""

import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest

from megafold_bench import checks as ck
from megafold_bench import doctor as dr


def test_every_complaint_has_a_remedy():
    checks = dr.doctor(probe=False)
    assert [check.name for check in checks][-1] == "verdict"
    assert len({check.name for check in checks}) == len(checks)
    for check in checks[:-1]:
        assert check.status in ("ok", "warn", "fail")
        assert check.detail
        assert check.status == "ok" or check.remedy


def test_a_good_machine(nvidia_gpus, monkeypatch):
    monkeypatch.setattr(dr, "check_torch_runs", lambda: dr.Check("torch runs", "ok", "on NVIDIA H200"))
    checks = {check.name: check for check in dr.doctor()}
    assert checks["GPU"].status == "ok"
    assert "NVIDIA H200 140.4 GiB" in checks["GPU"].detail
    assert nvidia_gpus[0].uuid in checks["visible devices"].detail
    assert checks["torch and driver"].status == "ok"
    assert checks["NVML"].status == "ok"
    assert "sweeps on the GPU" in checks["verdict"].detail.split("; does not")[0]
    assert "power and energy" in checks["verdict"].detail


def test_old_torch(set_torch):
    set_torch("nvidia", "2.9.1+cu130")
    assert dr.check_torch().status == "fail"
    set_torch("nvidia", "2.11.0")
    assert dr.check_torch().status == "ok"


@pytest.mark.parametrize(("raw", "status"), [(13000, "ok"), (13020, "ok"), (14000, "ok"), (12080, "fail")])
def test_driver_must_serve_torchs_cuda(nvidia_gpus, monkeypatch, raw, status):
    monkeypatch.setattr(sys.modules["pynvml"], "nvmlSystemGetCudaDriverVersion", lambda: raw)
    check = dr.check_torch_matches_driver()
    assert check.status == status
    assert f"CUDA {raw // 1000}.{raw % 1000 // 10}" in check.detail


def test_torch_for_the_wrong_vendor(nvidia_gpus, set_torch):
    set_torch("amd")
    assert dr.check_torch_matches_driver().status == "fail"
    set_torch(None)
    check = dr.check_torch_matches_driver()
    assert check.status == "warn"
    assert "CPU build" in check.detail


def test_hidden_gpus_are_explained(nvidia_gpus, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    check = dr.check_visible()
    assert check.status == "warn"
    assert "CUDA_VISIBLE_DEVICES='7'" in check.remedy


def test_shadowed_pynvml(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", ModuleType("pynvml"))
    check = dr.check_nvml()
    assert check.status == "fail"
    assert "uninstall -y pynvml" in check.remedy


@pytest.mark.parametrize(("vendor", "status"), [("nvidia", "warn"), ("amd", "fail")])
def test_amdsmi_package_without_a_library(monkeypatch, tmp_path, set_torch, vendor, status):
    (tmp_path / "amdsmi").mkdir()
    (tmp_path / "amdsmi" / "__init__.py").write_text("raise KeyError('libamd_smi.so')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(dr.host, "package_version", lambda name: "7.0.2")
    set_torch(vendor)
    check = dr.check_amdsmi()
    assert check.status == status
    assert "libamd_smi.so" in check.detail
    assert "pip uninstall amdsmi" in check.remedy


def test_torch_broken_by_amdsmi(monkeypatch):
    done = SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nKeyError: 'libamd_smi.so'\n")
    monkeypatch.setattr(ck.subprocess, "run", lambda *a, **k: done)
    check = dr.check_torch_runs()
    assert check.status == "fail"
    assert "pip uninstall amdsmi" in check.remedy


def test_torch_that_hangs_or_computes_wrongly(monkeypatch):
    def hangs(*a, **k):
        raise subprocess.TimeoutExpired("python", 1)

    monkeypatch.setattr(ck.subprocess, "run", hangs)
    assert "took over" in dr.check_torch_runs(1.0).detail
    wrong = '{"torch": "2.13", "cuda": true, "sum": 0.0, "arch": ["sm_90"], "name": "H200"}'
    monkeypatch.setattr(
        ck.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=0, stdout=wrong, stderr="")
    )
    assert dr.check_torch_runs().status == "fail"


def test_allocator_settings(monkeypatch, set_torch):
    for name in dr.ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    set_torch("amd")
    assert dr.check_allocator().status == "ok"
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    assert dr.check_allocator().status == "warn"
    set_torch("nvidia")
    assert dr.check_allocator().status == "ok"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    assert "disagree" in dr.check_allocator().detail


def test_missing_compilers(monkeypatch):
    monkeypatch.setattr(dr.shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(dr.host, "first_version", lambda *names: "3.6.0")
    assert dr.check_compiler().status == "warn"
    assert dr.check_triton().status == "fail"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in dr.check_compiler().detail


@pytest.mark.parametrize(("free", "status"), [(1 << 20, "fail"), (1 << 29, "warn"), (1 << 40, "ok")])
def test_shared_memory(monkeypatch, free, status):
    monkeypatch.setattr(dr.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    check = dr.check_shm()
    assert check.status == status
    assert ("--shm-size" in check.remedy) is (status != "ok")


def test_a_tight_cgroup(monkeypatch):
    monkeypatch.setattr(dr.host, "ram_bytes", lambda: 64 << 30)
    monkeypatch.setattr(dr.host, "cgroup_memory_limit_bytes", lambda: 4 << 30)
    check = dr.check_memory()
    assert check.status == "warn"
    assert "4.0 GiB" in check.detail


def test_unwritable_caches(monkeypatch):
    monkeypatch.setattr(dr.os, "access", lambda path, mode: False)
    check = dr.check_caches()
    assert check.status == "fail"
    assert "TRITON_CACHE_DIR" in check.remedy


def test_verdict_of_failures(monkeypatch, set_torch):
    set_torch(None)
    checks = [
        dr.Check("torch", "fail", "not installed", "install it"),
        dr.Check("C++ compiler", "warn", "none", "install it"),
    ]
    verdict = dr.verdict(checks)
    assert verdict.status == "fail"
    assert verdict.detail.startswith("works: nothing")
    assert verdict.remedy == "mend: torch"
