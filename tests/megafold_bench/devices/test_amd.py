"""AMD SMI: keys and units of every version, every import failure, and the way down to sysfs."""

import sys

import pytest

from megafold_bench import devices
from megafold_bench.devices import Unavailable, amd, open_device, open_selector
from megafold_bench.devices.amd import watts
from megafold_bench.devices.sysfs import SysfsDevice, amd_folders


def test_readings_are_si(amd_gpus):
    device = open_device("cuda", 1)
    assert device.memory().total_bytes == 192 << 30
    assert device.memory().used_bytes == 5 << 30
    assert device.power_w() == 412.0
    assert device.energy_j() == pytest.approx(15.3)
    assert device.utilisation() == pytest.approx(0.93)
    assert device.sm_clock_hz() == pytest.approx(2.1e9)
    assert device.temperature_c() == 61.0
    traffic = device.link_traffic()
    assert (traffic.rx_bytes_per_s, traffic.tx_bytes_per_s) == (2560, 1280)


def test_identity_and_settings(amd_gpus):
    device = open_device("cuda", 1)
    identity, settings = device.identity, device.settings
    assert (identity.name, identity.uuid) == ("AMD Instinct MI300X", "GPU-000000000000ab12")
    assert (identity.pci_id, identity.arch, identity.driver) == ("0000:05:00.0", "gfx942", "6.12.12")
    assert (settings.partition, settings.ecc, settings.power_limit_w) == ("SPX/NPS1", True, 750.0)


@pytest.mark.parametrize(
    ("power", "expected"),
    [
        ({"socket_power": 412, "average_socket_power": "N/A"}, 412.0),
        ({"current_socket_power": 300, "average_socket_power": "N/A"}, 300.0),
        ({"current_socket_power": "N/A", "average_socket_power": 250}, 250.0),
        ({"socket_power": 0xFFFF, "average_socket_power": 111}, 111.0),
        ({"average_socket_power": "98 W"}, 98.0),
        ({"socket_power": 412_000}, 412.0),
        ({"socket_power": 412_000_000}, 412.0),
    ],
)
def test_power_keys_and_units(amd_gpus, power, expected):
    amd_gpus[0].power = power
    assert open_selector("amd:0000:05:00.0").power_w() == pytest.approx(expected)


def test_power_that_is_nowhere(amd_gpus):
    amd_gpus[0].power = {"socket_power": "N/A", "average_socket_power": "N/A"}
    reading = open_selector("amd:0000:05:00.0").power_w()
    assert isinstance(reading, Unavailable)
    assert "average_socket_power" in reading.reason


@pytest.mark.parametrize(
    ("raw", "expected"),
    [(750, 750.0), (750_000, 750.0), (750_000_000, 750.0), (40, 40.0), (40_000, 40.0), (40_000_000, 40.0)],
)
def test_watts_from_any_unit(raw, expected):
    assert watts(raw, "power") == pytest.approx(expected)


@pytest.mark.parametrize(
    "energy",
    [
        {"energy_accumulator": 2_000_000, "counter_resolution": 15.3},
        {"power": 2_000_000, "counter_resolution": 15.3},
        {"power": 2_000_000, "energy_accumulator": 2_000_000, "counter_resolution": 15.3},
    ],
)
def test_energy_key_variants(amd_gpus, energy):
    amd_gpus[0].energy = energy
    assert open_selector("amd:0000:05:00.0").energy_j() == pytest.approx(30.6)


def test_dead_energy_counter_of_the_second_die(amd_gpus):
    amd_gpus[0].energy = {"energy_accumulator": 0, "counter_resolution": 15.3}
    assert isinstance(open_selector("amd:0000:05:00.0").energy_j(), Unavailable)


def test_memory_in_mebibytes_where_the_byte_call_is_missing(amd_gpus, monkeypatch):
    monkeypatch.delattr(sys.modules["amdsmi"], "amdsmi_get_gpu_memory_usage")
    memory = open_selector("amd:0000:05:00.0").memory()
    assert (memory.total_bytes, memory.used_bytes) == (196608 << 20, 5120 << 20)


@pytest.mark.parametrize(("raw", "expected"), [(61, 61.0), (61_000, 61.0), (105, 105.0)])
def test_temperature_units(amd_gpus, raw, expected):
    amd_gpus[0].temperatures["HOTSPOT"] = raw
    assert open_selector("amd:0000:05:00.0").temperature_c() == pytest.approx(expected)


def test_temperature_sensors_in_turn(amd_gpus):
    device = open_selector("amd:0000:05:00.0")
    amd_gpus[0].temperatures = {"HOTSPOT": "N/A", "JUNCTION": RuntimeError("no"), "EDGE": 44}
    assert device.temperature_c() == 44.0
    amd_gpus[0].temperatures["EDGE"] = RuntimeError("NOT_SUPPORTED")
    assert "NOT_SUPPORTED" in device.temperature_c().reason


def test_clock_key_of_6_1(amd_gpus):
    amd_gpus[0].clock = {"cur_clk": 1500, "max_clk": 2100}
    assert open_selector("amd:0000:05:00.0").memory_clock_hz() == pytest.approx(1.5e9)


def test_throttling_from_rising_counters(amd_gpus):
    device = open_selector("amd:0000:05:00.0")
    assert device.throttle_reasons() == ()
    amd_gpus[0].metrics = {"ppt_residency_acc": 130, "prochot_residency_acc": 0}
    assert device.throttle_reasons() == ("sw_power_cap",)
    assert device.throttle_reasons() == ()


def test_throttling_from_violations_where_there_are_no_counters(amd_gpus):
    amd_gpus[0].metrics = RuntimeError("NOT_SUPPORTED")
    device = open_selector("amd:0000:05:00.0")
    assert isinstance(device.throttle_reasons(), Unavailable)
    amd_gpus[0].violations = {"active_ppt_pwr": True, "active_socket_thrm": False, "active_hbm_thrm": "N/A"}
    assert device.throttle_reasons() == ("sw_power_cap",)
    amd_gpus[0].violations = dict.fromkeys(amd.VIOLATIONS, "N/A")
    assert isinstance(device.throttle_reasons(), Unavailable)


def test_processes_of_both_library_generations(amd_gpus, monkeypatch):
    device = open_selector("amd:0000:05:00.0")
    assert device.processes()[0].used_bytes == 2 << 30
    amd_gpus[0].processes = ["handle"]
    details = lambda h, p: {"pid": 78, "mem": 7}  # noqa: E731
    monkeypatch.setattr(sys.modules["amdsmi"], "amdsmi_get_gpu_process_info", details, raising=False)
    process = device.processes()[0]
    assert (process.pid, process.used_bytes) == (78, 7)


def test_older_libraries_order_by_kfd_node(amd_gpus):
    for gpu in amd_gpus:
        gpu.enumeration = AttributeError("amdsmi_get_gpu_enumeration_info")
    assert open_device("cuda", 0).identity.pci_id == "0000:26:00.0"


def _write_package(folder, body):
    package = folder / "amdsmi"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(body)


FAILURES = {
    "KeyError: 'ROCM_PATH'": "raise KeyError('ROCM_PATH')",
    "KeyError: 'libamd_smi.so'": "print('Error: no libamd_smi.so in any of these paths')\nimport amdsmi.part\nraise KeyError('libamd_smi.so')",
    "OSError: libamd_smi.so.26": "raise OSError('libamd_smi.so.26: cannot open shared object file')",
    "ImportError: too old": "raise ImportError('too old')",
}


@pytest.mark.parametrize("reason", FAILURES)
def test_every_import_failure_is_a_reason_and_prints_nothing(reason, tmp_path, monkeypatch, capsys):
    _write_package(tmp_path / "site", FAILURES[reason])
    (tmp_path / "site" / "amdsmi" / "part.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    reading = amd.load_amdsmi()
    assert isinstance(reading, Unavailable)
    assert reason in reading.reason
    assert capsys.readouterr().out == ""
    assert not [name for name in sys.modules if name.split(".")[0] == "amdsmi"]


WORKING = """
class AmdSmiInitFlags:
    INIT_AMD_GPUS = 2
def amdsmi_init(flags):
    print("noise")
"""


def test_rocms_own_module_comes_first(tmp_path, monkeypatch, capsys):
    _write_package(tmp_path / "site", "raise KeyError('libamd_smi.so')")
    _write_package(tmp_path / "rocm" / "share" / "amd_smi", WORKING)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("ROCM_PATH", str(tmp_path / "rocm"))
    path = list(sys.path)
    module = amd.load_amdsmi()
    assert not isinstance(module, Unavailable)
    assert "rocm" in module.__file__
    assert sys.path == path
    assert capsys.readouterr().out == ""
    del sys.modules["amdsmi"]


def test_the_installed_package_is_the_second_choice(tmp_path, monkeypatch):
    _write_package(tmp_path / "site", WORKING)
    _write_package(tmp_path / "rocm" / "share" / "amd_smi", "raise KeyError('libamd_smi.so')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("ROCM_PATH", str(tmp_path / "rocm"))
    module = amd.load_amdsmi()
    assert not isinstance(module, Unavailable)
    assert "site" in module.__file__
    del sys.modules["amdsmi"]


def test_failure_at_the_first_call(amd_gpus, monkeypatch):
    def fails(flags):
        raise RuntimeError("AMDSMI_STATUS_DRIVER_NOT_LOADED")

    monkeypatch.setattr(sys.modules["amdsmi"], "amdsmi_init", fails)
    assert "DRIVER_NOT_LOADED" in open_device("cuda", 0).power_w().reason


def _fake_card(root, bdf="0000:c1:00.0"):
    folder = root / "class" / "card0" / "device"
    folder.parent.mkdir(parents=True)
    real = root / bdf
    hwmon = real / "hwmon" / "hwmon3"
    hwmon.mkdir(parents=True)
    folder.symlink_to(real)
    files = {
        "vendor": "0x1002", "mem_info_vram_total": str(64 << 30), "mem_info_vram_used": str(3 << 30),
        "unique_id": "fb4e2a5c1d2e3f40", "gpu_busy_percent": "55", "hwmon/hwmon3/power1_average": "231000000",
        "hwmon/hwmon3/power1_cap": "500000000", "hwmon/hwmon3/temp1_input": "41000",
        "hwmon/hwmon3/temp2_input": "47000", "hwmon/hwmon3/freq1_input": "1700000000",
    }  # fmt: skip
    for name, content in files.items():
        (real / name).write_text(content + "\n")
    return real


def test_sysfs_stands_in_for_a_missing_library(tmp_path, monkeypatch, set_torch):
    folder = _fake_card(tmp_path)
    monkeypatch.setattr(devices.sysfs, "amd_folders", lambda: [folder])
    set_torch("amd")
    monkeypatch.setitem(sys.modules, "amdsmi", None)
    device = open_device("cuda", 0)
    assert isinstance(device, SysfsDevice)
    assert (device.memory().used_bytes, device.memory().total_bytes) == (3 << 30, 64 << 30)
    assert device.power_w() == pytest.approx(231.0)
    assert device.settings.power_limit_w == pytest.approx(500.0)
    assert device.temperature_c() == pytest.approx(47.0)
    assert device.sm_clock_hz() == pytest.approx(1.7e9)
    assert device.utilisation() == pytest.approx(0.55)
    assert device.identity.uuid == "GPU-fb4e2a5c1d2e3f40"
    assert isinstance(device.energy_j(), Unavailable)


def test_sysfs_finds_amd_cards_only(tmp_path):
    folder = _fake_card(tmp_path)
    assert amd_folders(tmp_path / "class") == [folder]
    (folder / "vendor").write_text("0x10de\n")
    assert amd_folders(tmp_path / "class") == []


READERS = (
    "memory", "power_w", "energy_j", "utilisation", "sm_clock_hz", "memory_clock_hz", "temperature_c",
    "throttle_reasons", "link_traffic", "link_rx_bytes", "link_tx_bytes", "processes",
)  # fmt: skip


@pytest.mark.parametrize("answer", ["N/A", None, {}, KeyError("gone")])
def test_no_reading_ever_raises(amd_gpus, monkeypatch, answer):
    """Whatever every call of the library answers, a reading is a value or a reason."""
    device = open_selector("amd:0000:05:00.0")

    def give(*arguments):
        if isinstance(answer, Exception):
            raise answer
        return answer

    module = sys.modules["amdsmi"]
    for name in [name for name in vars(module) if name.startswith("amdsmi_get_")]:
        monkeypatch.setattr(module, name, give)
    for name in READERS:
        reading = getattr(device, name)()
        assert reading == () or (isinstance(reading, Unavailable) and reading.reason)
    assert isinstance(device.identity.name, Unavailable)
    assert isinstance(device.settings.ecc, Unavailable)
    assert isinstance(device.settings.power_limit_w, Unavailable)
