"""Fake vendor modules in `sys.modules`: both vendors are tested on any machine."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from megafold_bench import devices
from megafold_bench.devices.torch_facts import TorchBuild

UUIDS = ["GPU-11111111-aaaa-4000-8000-000000000001", "GPU-22222222-bbbb-4000-8000-000000000002"]
MIG_UUIDS = ["MIG-33333333-cccc-4000-8000-000000000003", "MIG-44444444-dddd-4000-8000-000000000004"]


class NVMLError(Exception):
    pass


class Gpu:
    """One fake NVIDIA GPU. Setting an attribute to an exception makes its getter raise."""

    def __init__(self, uuid, name="NVIDIA H200"):
        self.uuid, self.name = uuid, name
        self.bus = "00000000:1B:00.0"
        self.memory = SimpleNamespace(
            total=150_754_820_096, used=20_681_981_952, free=130_072_838_144, reserved=600_000_000
        )
        self.power_mw = 345_678
        self.energy_mj = 9_876_543
        self.util = 87
        self.clocks = {1: 1980, 2: 3201}
        self.temperature = 54
        self.reasons = 0x4 | 0x1
        self.processes = [
            SimpleNamespace(pid=42, usedGpuMemory=1 << 30),
            SimpleNamespace(pid=43, usedGpuMemory=None),
        ]
        self.pcie_kb = {0: 1000, 1: 2000}
        self.fields = {197: 5_000_000_000, 198: 7_000_000_000}
        self.mig_mode = 0
        self.slices = []
        self.parent = self
        self.place = (0, 0)


def _give(value):
    if isinstance(value, Exception):
        raise value
    return value


def _field(value):
    if value is None:
        return SimpleNamespace(nvmlReturn=3, valueType=0, value=None)
    return SimpleNamespace(
        nvmlReturn=0, valueType=3, value=SimpleNamespace(uiVal=value & 0xFFFFFFFF, ullVal=value)
    )


def build_nvml(gpus):
    """A module with the calls of nvidia-ml-py that this project uses."""
    m = ModuleType("pynvml")
    m.NVMLError = NVMLError
    m._nvmlGetFunctionPointer = object()
    m.users = 0
    m.nvmlMemory_v2 = 0x2000028
    m.NVML_CLOCK_SM, m.NVML_CLOCK_MEM, m.NVML_TEMPERATURE_GPU = 1, 2, 0
    m.NVML_PCIE_UTIL_TX_BYTES, m.NVML_PCIE_UTIL_RX_BYTES = 0, 1

    def by_uuid(uuid):
        for gpu in gpus:
            for candidate in (gpu, *gpu.slices):
                if candidate.uuid == uuid:
                    return candidate
        raise NVMLError("Not Found")

    def init():
        m.users += 1

    def shutdown():
        m.users -= 1

    def slice_by_index(gpu, index):
        if index >= len(gpu.slices):
            raise NVMLError("Not Found")
        return gpu.slices[index]

    m.nvmlInit, m.nvmlShutdown = init, shutdown
    m.nvmlDeviceGetCount = lambda: len(gpus)
    m.nvmlDeviceGetHandleByIndex = lambda index: gpus[index]
    m.nvmlDeviceGetHandleByUUID = by_uuid
    m.nvmlDeviceGetUUID = lambda h: h.uuid
    m.nvmlDeviceGetName = lambda h: h.name
    m.nvmlDeviceGetPciInfo = lambda h: SimpleNamespace(busId=h.bus)
    m.nvmlDeviceGetCudaComputeCapability = lambda h: (9, 0)
    m.nvmlSystemGetDriverVersion = lambda: "580.65.06"
    m.nvmlSystemGetCudaDriverVersion = lambda: 13000
    m.nvmlDeviceGetMigMode = lambda h: (_give(h.mig_mode), 0)
    m.nvmlDeviceGetMaxMigDeviceCount = lambda h: 7
    m.nvmlDeviceGetMigDeviceHandleByIndex = slice_by_index
    m.nvmlDeviceGetDeviceHandleFromMigDeviceHandle = lambda h: h.parent
    m.nvmlDeviceGetGpuInstanceId = lambda h: h.place[0]
    m.nvmlDeviceGetComputeInstanceId = lambda h: h.place[1]
    m.nvmlDeviceGetEccMode = lambda h: (1, 1)
    m.nvmlDeviceGetEnforcedPowerLimit = lambda h: 700_000
    m.nvmlDeviceGetMemoryInfo = lambda h, version=None: _give(h.memory)
    m.nvmlDeviceGetPowerUsage = lambda h: _give(h.power_mw)
    m.nvmlDeviceGetTotalEnergyConsumption = lambda h: _give(h.energy_mj)
    m.nvmlDeviceGetUtilizationRates = lambda h: SimpleNamespace(gpu=_give(h.util), memory=10)
    m.nvmlDeviceGetClockInfo = lambda h, kind: _give(h.clocks[kind])
    m.nvmlDeviceGetTemperature = lambda h, sensor: _give(h.temperature)
    m.nvmlDeviceGetTemperatureV = lambda h, sensor: _give(h.temperature)
    m.nvmlDeviceGetCurrentClocksEventReasons = lambda h: _give(h.reasons)
    m.nvmlDeviceGetPcieThroughput = lambda h, counter: _give(h.pcie_kb[counter])
    m.nvmlDeviceGetFieldValues = lambda h, numbers: [_field(_give(h.fields[n])) for n in numbers]
    m.nvmlDeviceGetComputeRunningProcesses = lambda h: _give(h.processes)
    return m


def with_mig(gpu):
    """Put a fake GPU in MIG mode with two instances; instances have no power or energy of their own."""
    gpu.mig_mode = 1
    for number, uuid in enumerate(MIG_UUIDS):
        part = Gpu(uuid, "NVIDIA H200 MIG 3g.71gb")
        part.parent, part.place = gpu, (number + 1, 0)
        part.memory = SimpleNamespace(total=71 << 30, used=1 << 30, free=70 << 30, reserved=0)
        part.power_mw = part.energy_mj = NVMLError("Not Supported")
        gpu.slices.append(part)


class AmdSmiException(Exception):
    pass


class AmdGpu:
    """One fake AMD GPU: each attribute is what the library's call of that name returns."""

    def __init__(self, bdf, serial, hip_id):
        self.bdf = bdf
        self.asic = {
            "market_name": "AMD Instinct MI300X",
            "target_graphics_version": "gfx942",
            "asic_serial": serial,
        }
        self.enumeration = {"hip_id": hip_id}
        self.kfd = {"node_id": hip_id + 2}
        self.total, self.used = 192 << 30, 5 << 30
        self.vram = {"vram_total": 196608, "vram_used": 5120}
        # MI300X on ROCm 7: the average is 'N/A'.
        self.power = {"socket_power": 412, "current_socket_power": "N/A", "average_socket_power": "N/A"}
        self.cap = {"power_cap": 750_000_000}
        self.energy = {"energy_accumulator": 1_000_000, "counter_resolution": 15.3, "timestamp": 1}
        self.activity = {"gfx_activity": 93, "umc_activity": 40, "mm_activity": "N/A"}
        self.temperatures = {"HOTSPOT": 61, "JUNCTION": 61, "EDGE": AmdSmiException("NOT_SUPPORTED")}
        self.clock = {"clk": 2100, "min_clk": 132, "max_clk": 2100}
        self.metrics = {"ppt_residency_acc": 100, "prochot_residency_acc": 0, "hbm_thm_residency_acc": "N/A"}
        self.violations = AmdSmiException("NOT_SUPPORTED")
        self.processes = [{"pid": 77, "mem": 3 << 30, "memory_usage": {"vram_mem": 2 << 30}}]
        self.throughput = {"sent": 10, "received": 20, "max_pkt_sz": 128}


def build_amdsmi(gpus):
    """A module with the calls of amdsmi that this project uses."""
    m = ModuleType("amdsmi")
    m.AmdSmiException = AmdSmiException
    m.started = 0
    m.AmdSmiInitFlags = SimpleNamespace(INIT_AMD_GPUS=2)
    m.AmdSmiMemoryType = SimpleNamespace(VRAM="VRAM")
    m.AmdSmiClkType = SimpleNamespace(GFX="GFX", MEM="MEM")
    m.AmdSmiTemperatureType = SimpleNamespace(HOTSPOT="HOTSPOT", JUNCTION="JUNCTION", EDGE="EDGE")
    m.AmdSmiTemperatureMetric = SimpleNamespace(CURRENT="CURRENT")

    def init(flags):
        m.started += 1

    m.amdsmi_init = init
    m.amdsmi_get_processor_handles = lambda: gpus
    m.amdsmi_get_gpu_device_bdf = lambda h: h.bdf
    m.amdsmi_get_gpu_device_uuid = lambda h: "18ff74a1-0000-1000-80f7-000000000000"
    m.amdsmi_get_gpu_asic_info = lambda h: h.asic
    m.amdsmi_get_gpu_enumeration_info = lambda h: _give(h.enumeration)
    m.amdsmi_get_gpu_kfd_info = lambda h: _give(h.kfd)
    m.amdsmi_get_gpu_driver_info = lambda h: {"driver_name": "amdgpu", "driver_version": "6.12.12"}
    m.amdsmi_get_gpu_memory_total = lambda h, kind: _give(h.total)
    m.amdsmi_get_gpu_memory_usage = lambda h, kind: _give(h.used)
    m.amdsmi_get_gpu_vram_usage = lambda h: _give(h.vram)
    m.amdsmi_get_power_info = lambda h: _give(h.power)
    m.amdsmi_get_power_cap_info = lambda h: _give(h.cap)
    m.amdsmi_get_energy_count = lambda h: _give(h.energy)
    m.amdsmi_get_gpu_activity = lambda h: _give(h.activity)
    m.amdsmi_get_temp_metric = lambda h, sensor, metric: _give(h.temperatures[sensor])
    m.amdsmi_get_clock_info = lambda h, kind: _give(h.clock)
    m.amdsmi_get_gpu_metrics_info = lambda h: _give(h.metrics)
    m.amdsmi_get_violation_status = lambda h: _give(h.violations)
    m.amdsmi_get_gpu_process_list = lambda h: _give(h.processes)
    m.amdsmi_get_gpu_pci_throughput = lambda h: _give(h.throughput)
    m.amdsmi_get_gpu_compute_partition = lambda h: "SPX"
    m.amdsmi_get_gpu_memory_partition = lambda h: "NPS1"
    m.amdsmi_get_gpu_ecc_enabled = lambda h: 5
    return m


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    """No selection from outside, no vendor library of the machine the tests run on."""
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ROCM_PATH", str(tmp_path / "no-rocm"))
    monkeypatch.setattr(devices.sysfs, "amd_folders", list)
    monkeypatch.setattr(devices, "initialised_cuda", lambda: None)
    monkeypatch.setattr("megafold_bench.environment.initialised_cuda", lambda: None)
    monkeypatch.delitem(sys.modules, "amdsmi", raising=False)


@pytest.fixture
def set_torch(monkeypatch, tmp_path):
    """Pretend that torch was built for this vendor."""

    def set_build(vendor, version="2.13.0"):
        build = TorchBuild(
            version,
            "abc",
            "13.0" if vendor == "nvidia" else None,
            "7.0" if vendor == "amd" else None,
            tmp_path,
        )
        for name in (
            "megafold_bench.devices",
            "megafold_bench.environment",
            "megafold_bench.doctor",
            "megafold_bench.checks",
        ):
            module = sys.modules.get(name)
            if module is not None:
                monkeypatch.setattr(module, "torch_build", lambda: build)

    return set_build


@pytest.fixture
def nvidia_gpus(monkeypatch, set_torch):
    """Two equal NVIDIA GPUs behind a fake NVML, and torch for them."""
    gpus = [Gpu(UUIDS[0]), Gpu(UUIDS[1])]
    monkeypatch.setitem(sys.modules, "pynvml", build_nvml(gpus))
    set_torch("nvidia")
    return gpus


@pytest.fixture
def mig_gpus(nvidia_gpus):
    """The first of the two in MIG mode."""
    with_mig(nvidia_gpus[0])
    return nvidia_gpus


@pytest.fixture
def amd_gpus(monkeypatch, set_torch):
    """Two AMD GPUs whose PCI order is the reverse of HIP's, and torch for them."""
    gpus = [AmdGpu("0000:05:00.0", "0xAB12", 1), AmdGpu("0000:26:00.0", "0xCD34", 0)]
    monkeypatch.setitem(sys.modules, "amdsmi", build_amdsmi(gpus))
    set_torch("amd")
    return gpus
