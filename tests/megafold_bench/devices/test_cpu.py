"""The CPU's readings, on this host and on made-up files."""

import os

import pytest

from megafold_bench.devices import CpuDevice, Unavailable
from megafold_bench.devices.cpu import process_rss_bytes


def _rapl(root, package, uj, limit=1_000_000_000):
    folder = root / f"intel-rapl:{package}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "energy_uj").write_text(f"{uj}\n")
    (folder / "max_energy_range_uj").write_text(f"{limit}\n")


def test_this_host():
    device = CpuDevice()
    memory = device.memory()
    assert 0 < memory.used_bytes < memory.total_bytes
    assert memory.used_bytes + memory.free_bytes == memory.total_bytes
    assert isinstance(device.power_w(), Unavailable)
    assert 1 << 20 < process_rss_bytes() < memory.total_bytes
    assert process_rss_bytes(os.getpid()) > 1 << 20


def test_rapl_sums_packages_and_survives_a_wrap(tmp_path):
    _rapl(tmp_path, 0, 900_000_000)
    _rapl(tmp_path, 1, 100_000_000)
    (tmp_path / "intel-rapl:0:0").mkdir()
    device = CpuDevice(powercap=tmp_path)
    assert device.energy_j() == pytest.approx(1000.0)
    _rapl(tmp_path, 0, 50_000_000)
    assert device.energy_j() == pytest.approx(50.0 + 1000.0 + 100.0)


def test_unreadable_rapl_is_unavailable(tmp_path):
    _rapl(tmp_path, 0, 1)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert isinstance(CpuDevice(powercap=tmp_path).energy_j(), Unavailable)
    assert "RAPL" in CpuDevice(powercap=tmp_path / "none").energy_j().reason


def test_utilisation_is_the_share_of_ticks(tmp_path):
    (tmp_path / "stat").write_text("cpu 100 0 0 900 0 0 0 0 0 0\n")
    device = CpuDevice(proc=tmp_path)
    assert isinstance(device.utilisation(), Unavailable)
    (tmp_path / "stat").write_text("cpu 175 0 0 920 5 0 0 0 0 0\n")
    assert device.utilisation() == pytest.approx(0.75)


def test_broken_meminfo(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\n")
    assert "MemAvailable" in CpuDevice(proc=tmp_path).memory().reason
