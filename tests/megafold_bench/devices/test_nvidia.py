"""NVML readings in SI units, and every way in which NVML can be missing."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from megafold_bench.devices import Unavailable, UnavailableDevice, nvidia, open_device


def test_readings_are_si(nvidia_gpus):
    device = open_device("cuda", 0)
    assert device.memory().used_bytes == 20_681_981_952
    assert device.memory().reserved_bytes == 600_000_000
    assert device.power_w() == pytest.approx(345.678)
    assert device.energy_j() == pytest.approx(9876.543)
    assert device.utilisation() == pytest.approx(0.87)
    assert device.sm_clock_hz() == pytest.approx(1.98e9)
    assert device.memory_clock_hz() == pytest.approx(3.201e9)
    assert device.temperature_c() == 54
    assert device.link_traffic().tx_bytes_per_s == pytest.approx(1e6)
    assert device.link_traffic().rx_bytes_per_s == pytest.approx(2e6)


def test_link_counters(nvidia_gpus):
    device = open_device("cuda", 0)
    assert (device.link_tx_bytes(), device.link_rx_bytes()) == (5_000_000_000, 7_000_000_000)
    nvidia_gpus[0].fields[198] = None
    assert device.link_rx_bytes() == Unavailable("PCIe bytes received: LookupError: NVML gave code 3")


def test_identity_and_settings(nvidia_gpus):
    device = open_device("cuda", 1)
    identity, settings = device.identity, device.settings
    assert (identity.vendor, identity.name, identity.uuid) == ("nvidia", "NVIDIA H200", nvidia_gpus[1].uuid)
    assert (identity.arch, identity.driver, identity.total_bytes) == ("sm_90", "580.65.06", 150_754_820_096)
    assert (settings.partition, settings.ecc, settings.power_limit_w) == ("none", True, 700.0)


def test_throttling_leaves_out_idle(nvidia_gpus):
    device = open_device("cuda", 0)
    assert device.throttle_reasons() == ("sw_power_cap",)
    nvidia_gpus[0].reasons = 0x1 | 0x2 | 0x10 | 0x100
    assert device.throttle_reasons() == ()
    nvidia_gpus[0].reasons = 0x40 | 0x80
    assert device.throttle_reasons() == ("hw_thermal_slowdown", "hw_power_brake_slowdown")


@pytest.mark.parametrize(
    "missing",
    ["N/A", None, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF, float("nan"), RuntimeError("Not Supported")],
)
def test_every_form_of_no_value_is_unavailable_with_a_reason(nvidia_gpus, missing):
    nvidia_gpus[0].power_mw = missing
    reading = open_device("cuda", 0).power_w()
    assert isinstance(reading, Unavailable)
    assert reading.reason.startswith("power: ")
    assert len(reading.reason) > len("power: ")


def test_process_memory_may_be_missing(nvidia_gpus):
    first, second = open_device("cuda", 0).processes()
    assert (first.pid, first.used_bytes) == (42, 1 << 30)
    assert isinstance(second.used_bytes, Unavailable)


def test_memory_falls_back_to_version_one(nvidia_gpus, monkeypatch):
    def old(handle, version=None):
        if version is not None:
            raise TypeError("unexpected keyword")
        return SimpleNamespace(total=100, used=40, free=60)

    monkeypatch.setattr(sys.modules["pynvml"], "nvmlDeviceGetMemoryInfo", old)
    memory = open_device("cuda", 0).memory()
    assert (memory.used_bytes, memory.reserved_bytes) == (40, None)


def test_temperature_falls_back_to_the_old_call(nvidia_gpus, monkeypatch):
    monkeypatch.delattr(sys.modules["pynvml"], "nvmlDeviceGetTemperatureV")
    assert open_device("cuda", 0).temperature_c() == 54


def test_old_throttle_call(nvidia_gpus, monkeypatch):
    module = sys.modules["pynvml"]
    call = module.nvmlDeviceGetCurrentClocksEventReasons
    monkeypatch.delattr(module, "nvmlDeviceGetCurrentClocksEventReasons")
    assert isinstance(open_device("cuda", 0).throttle_reasons(), Unavailable)
    monkeypatch.setattr(module, "nvmlDeviceGetCurrentClocksThrottleReasons", call, raising=False)
    assert open_device("cuda", 0).throttle_reasons() == ("sw_power_cap",)


def test_every_initialisation_is_given_back(nvidia_gpus):
    device = open_device("cuda", 0)
    module = sys.modules["pynvml"]
    assert module.users == 1
    device.close()
    assert module.users == 0
    assert isinstance(nvidia.open_uuid("GPU-none"), Unavailable)
    assert module.users == 0


def test_mig_instance_has_own_memory_and_the_boards_power(mig_gpus):
    device = open_device("cuda", 0)
    assert device.identity.uuid.startswith("MIG-33333333")
    assert device.memory().total_bytes == 71 << 30
    assert device.power_w() == pytest.approx(345.678)
    assert isinstance(device.energy_j(), Unavailable)
    assert "MIG" in device.settings.partition


def test_shadowing_pynvml_is_named(monkeypatch, set_torch):
    old = ModuleType("pynvml")
    old.nvmlInit = lambda: None
    monkeypatch.setitem(sys.modules, "pynvml", old)
    set_torch("nvidia")
    reading = nvidia.load_nvml()
    assert isinstance(reading, Unavailable)
    assert "shadows nvidia-ml-py" in reading.reason
    device = open_device("cuda", 0)
    assert isinstance(device, UnavailableDevice)
    assert device.memory() == reading


def test_no_library(nvidia_gpus, monkeypatch):
    class NVMLError_LibraryNotFound(Exception):
        pass

    def absent():
        raise NVMLError_LibraryNotFound("NVML Shared Library Not Found")

    monkeypatch.setattr(sys.modules["pynvml"], "nvmlInit", absent)
    assert "NVMLError_LibraryNotFound" in open_device("cuda", 0).power_w().reason


def test_no_binding(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    reading = nvidia.load_nvml()
    assert isinstance(reading, Unavailable)
    assert "install nvidia-ml-py" in reading.reason


@pytest.mark.parametrize("answer", ["N/A", None, KeyError("gone")])
def test_no_reading_ever_raises(nvidia_gpus, monkeypatch, answer):
    """Whatever every call of the library answers, a reading is a value or a reason."""
    device = open_device("cuda", 0)

    def give(*arguments, **keywords):
        if isinstance(answer, Exception):
            raise answer
        return answer

    module = sys.modules["pynvml"]
    for name in [name for name in vars(module) if name.startswith(("nvmlDevice", "nvmlSystem"))]:
        monkeypatch.setattr(module, name, give)
    for name in (
        "memory", "power_w", "energy_j", "utilisation", "sm_clock_hz", "memory_clock_hz", "temperature_c",
        "throttle_reasons", "link_traffic", "link_rx_bytes", "link_tx_bytes", "processes",
    ):  # fmt: skip
        reading = getattr(device, name)()
        assert isinstance(reading, Unavailable)
        assert reading.reason
    assert isinstance(device.identity.name, Unavailable)
    assert isinstance(device.settings.power_limit_w, Unavailable)
