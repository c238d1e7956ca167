"""Which physical device is cuda:i, under every form of the visibility variables."""

import sys
from types import SimpleNamespace

import pytest

from megafold_bench import devices
from megafold_bench.devices import Unavailable, list_devices, open_device, open_selector, selector_for
from megafold_bench.devices.visible import Candidate, apply_visible, visible_amd, visible_nvidia

FOUR = [Candidate(f"k{i}", f"GPU-{i}{i}{i}{i}aaaa-0000", "H200") for i in range(4)]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, [0, 1, 2, 3]),
        ("", []),
        ("-1", []),
        ("2", [2]),
        ("3,0", [3, 0]),
        (" 1 , 2 ", [1, 2]),
        ("0,-1,2", [0]),
        ("0,9,2", [0]),
        ("0,x,2", [0]),
        ("1,1", []),
        ("NoDevFiles", []),
        ("GPU-2222aaaa-0000,GPU-0000aaaa-0000", [2, 0]),
        ("gpu-2222", [2]),
        ("GPU-", []),
        ("GPU-9999,0", []),
    ],
)
def test_forms_of_the_list(value, expected):
    assert [FOUR.index(device) for device in apply_visible(FOUR, value)] == expected


def test_mixed_gpus_need_a_stated_order():
    mixed = [Candidate("a", "GPU-a", "T400"), Candidate("b", "GPU-b", "H200")]
    assert isinstance(visible_nvidia(mixed, {}), Unavailable)
    assert visible_nvidia(mixed, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}) == mixed
    assert visible_nvidia(mixed, {"CUDA_VISIBLE_DEVICES": "GPU-b"}) == [mixed[1]]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"ROCR_VISIBLE_DEVICES": "3,1"}, [3, 1]),
        ({"HIP_VISIBLE_DEVICES": "2"}, [2]),
        ({"CUDA_VISIBLE_DEVICES": "2"}, [2]),
        ({"HIP_VISIBLE_DEVICES": "1", "CUDA_VISIBLE_DEVICES": "2"}, [1]),
        ({"ROCR_VISIBLE_DEVICES": "3,1", "HIP_VISIBLE_DEVICES": "1"}, [1]),
        ({"ROCR_VISIBLE_DEVICES": "3", "HIP_VISIBLE_DEVICES": "1"}, []),
        ({"ROCR_VISIBLE_DEVICES": "GPU-2222"}, [2]),
    ],
)
def test_rocr_filters_before_hip(environ, expected):
    assert [FOUR.index(device) for device in visible_amd(FOUR, environ)] == expected


def test_selector_follows_cuda_visible_devices(nvidia_gpus, monkeypatch):
    assert selector_for("cuda", 0) == f"nvidia:{nvidia_gpus[0].uuid}"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert selector_for("cuda", 0) == f"nvidia:{nvidia_gpus[1].uuid}"
    missing = selector_for("cuda", 1)
    assert isinstance(missing, Unavailable)
    assert "1 visible of 2" in missing.reason
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-2222")
    assert selector_for("cuda", 0) == f"nvidia:{nvidia_gpus[1].uuid}"


def test_mig_by_uuid_by_place_and_by_default(mig_gpus, monkeypatch):
    first, second = mig_gpus[0].slices
    assert selector_for("cuda", 0) == f"nvidia:{first.uuid}"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", second.uuid)
    assert selector_for("cuda", 0) == f"nvidia:{second.uuid}"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"MIG-{mig_gpus[0].uuid}/2/0")
    assert selector_for("cuda", 0) == f"nvidia:{second.uuid}"


def test_hip_order_is_not_pci_order(amd_gpus, monkeypatch):
    assert selector_for("cuda", 0) == "amd:0000:26:00.0"
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "1")
    assert selector_for("cuda", 0) == "amd:0000:05:00.0"
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "GPU-000000000000cd34")
    assert selector_for("cuda", 0) == "amd:0000:26:00.0"


def test_an_initialised_torch_is_asked(nvidia_gpus, monkeypatch):
    properties = SimpleNamespace(uuid=nvidia_gpus[1].uuid.removeprefix("GPU-"))
    cuda = SimpleNamespace(get_device_properties=lambda index: properties)
    monkeypatch.setattr(devices, "initialised_cuda", lambda: cuda)
    assert selector_for("cuda", 0) == f"nvidia:{nvidia_gpus[1].uuid}"


def test_an_initialised_torch_is_asked_on_amd(amd_gpus, monkeypatch):
    properties = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x05, pci_device_id=0)
    cuda = SimpleNamespace(get_device_properties=lambda index: properties)
    monkeypatch.setattr(devices, "initialised_cuda", lambda: cuda)
    assert selector_for("cuda", 0) == "amd:0000:05:00.0"


def test_every_gpu_is_listed_whatever_is_hidden(nvidia_gpus, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert list_devices() == tuple(f"nvidia:{gpu.uuid}" for gpu in nvidia_gpus)


def test_unknown_names():
    with pytest.raises(ValueError, match="tpu"):
        selector_for("tpu")
    with pytest.raises(ValueError, match="selector"):
        open_selector("intel:0")


def test_a_cpu_build_of_torch_has_no_cuda_device(nvidia_gpus, set_torch):
    set_torch(None)
    assert "CPU only" in open_device("cuda", 0).power_w().reason


def test_torch_is_not_imported_for_any_of_this():
    import subprocess

    code = (
        "import sys; from megafold_bench import environment as e; e.collect(); e.detect_accelerator(); "
        "import megafold_bench.measure.sampler; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
