"""Kernels in CUDA C++, compiled when they are first needed for the GPU at hand: where Triton cannot reach.

cupy compiles them. What it cannot launch, programs in clusters that overlap with the kernel before, NVIDIA's bindings
of the driver can, which CUDA builds of torch bring along.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from cableway.kernels import compilation
from cableway.kernels.lang import gpu_capability

Constants = tuple[tuple[str, int | str], ...]
_opening = Lock()


@dataclass(frozen=True)
class CudaKernel:
    """The kernel `name` of the file `name`.cu in `folder`; it takes one struct by value.

    What the file's macros stand for is told when it is launched: one kernel is compiled for each set of constants, and
    kept on disk beside Triton's.
    """

    name: str
    folder: Path = Path(__file__).parent

    def __call__(
        self, constants: Constants, arguments: bytes, *, num_programs: int, num_threads: int, shared_bytes: int = 0,
        cluster: int = 1, overlaps: bool = False,
    ) -> None:  # fmt: skip
        """Launch it on torch's stream.

        Args:
            arguments: the struct.
            shared_bytes: of a program, beside what the file declares.
            cluster: programs that reach one another's shared memory.
            overlaps: whether programs may start while the kernel before still runs; see `lang.overlapping`.
        """
        from cuda.bindings import driver

        function = _loaded(self, constants)
        struct = ctypes.create_string_buffer(arguments, len(arguments))
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(struct))
        sizes = num_programs, num_threads, shared_bytes, cluster, overlaps
        launch = _launch(*sizes, torch.cuda.current_stream().cuda_stream)
        _checked(driver.cuLaunchKernelEx(launch, function, ctypes.addressof(pointers), 0))

    def load(self, constants: Constants) -> None:
        """Have it compiled and loaded, from any thread, so that its first launch is like any other."""
        torch.cuda.synchronize()  # the first call of a thread makes the GPU's context its own
        _loaded(self, constants)

    def cubin(self, constants: Constants) -> bytes:
        """Machine code, compiled or as it was compiled before. Raises RuntimeError with what the compiler says."""
        source = (self.folder / f"{self.name}.cu").read_text()
        headers = {path.name: path.read_text() for path in sorted(self.folder.glob("*.cuh"))}
        options = [f"-arch=sm_{gpu_capability()}a", "-std=c++17", *(f"-D{name}={value}" for name, value in constants)]
        kept, file = compilation.kept(source, headers, options), f"{self.name}.cubin"
        path = kept.get_file(file) or kept.put(_compiled(source, headers, f"{self.name}.cu", options), file)
        return Path(path).read_bytes()


def _compiled(source: str, headers: dict[str, str], name: str, options: list[str]) -> bytes:
    try:
        from cupy.cuda import nvrtc
    except ModuleNotFoundError:
        raise RuntimeError(f"{name} has to be compiled by cupy: pip install 'cableway[cuda13]', or [cuda12]") from None
    with _opening:
        nvrtc.getVersion()  # finds and opens the library: a second thread would use it before its parts are there
    texts, names = ([part.encode() for part in parts] for parts in (headers.values(), headers))
    program = nvrtc.createProgram(source, name, texts, names)
    try:
        nvrtc.compileProgram(program, options)
        return nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError:
        raise RuntimeError(f"{name} does not compile: {nvrtc.getProgramLog(program)}") from None
    finally:
        nvrtc.destroyProgram(program)


def address(tensor: torch.Tensor | None) -> int:
    """For a struct's pointer; of nothing 0."""
    return 0 if tensor is None else tensor.data_ptr()


def tensor_map(matrix: torch.Tensor, box: tuple[int, ...]) -> bytes:
    """How Hopper's copies of boxes see a tensor of floats, whose last dimension is contiguous.

    In shared memory a box's rows lie one after another, 64 or 128 bytes each, whose parts of 16 bytes are swapped so
    that those of several rows lie in different banks. What lies outside the tensor is zeros, or not written. Other
    dimensions may be strided, by multiples of 16 bytes.
    """
    strides = tuple(stride * matrix.element_size() for stride in matrix.stride()[:-1])
    return _tensor_map(matrix.data_ptr(), tuple(matrix.shape), strides, box, matrix.dtype)


@lru_cache(4096)
def _tensor_map(
    start: int, shape: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], dtype: torch.dtype
) -> bytes:
    from cuda.bindings import driver as cu

    swizzles, is_wide = cu.CUtensorMapSwizzle, box[-1] * dtype.itemsize == 128
    made = _checked(
        cu.cuTensorMapEncodeTiled(
            getattr(cu.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{str(dtype)[6:].upper()}"),
            len(shape), start, [*map(cu.cuuint64_t, reversed(shape))], [*map(cu.cuuint64_t, reversed(strides))],
            [*map(cu.cuuint32_t, reversed(box))], [cu.cuuint32_t(1)] * len(shape),
            cu.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzles.CU_TENSOR_MAP_SWIZZLE_128B if is_wide else swizzles.CU_TENSOR_MAP_SWIZZLE_64B,
            cu.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            cu.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )  # fmt: skip
    return ctypes.string_at(made.getPtr(), 128)


@lru_cache(4096)
def _launch(num_programs: int, num_threads: int, shared_bytes: int, cluster: int, overlaps: bool, stream: int) -> Any:
    """How a kernel is launched, as the driver takes it. PERF: 20 us of the host, of 50 to 80, to make it each time."""
    from cuda.bindings.driver import CUlaunchConfig, CUstream

    launch = CUlaunchConfig()
    launch.gridDimX, launch.blockDimX, launch.sharedMemBytes = num_programs, num_threads, shared_bytes
    launch.gridDimY = launch.gridDimZ = launch.blockDimY = launch.blockDimZ = 1
    launch.hStream = CUstream(stream)
    launch.attrs = list(_attributes(cluster, overlaps))
    launch.numAttrs = len(launch.attrs)
    return launch


def _attributes(cluster: int, overlaps: bool) -> Iterator[Any]:
    from cuda.bindings.driver import CUlaunchAttribute, CUlaunchAttributeID

    if cluster > 1:
        sizes = CUlaunchAttribute()
        sizes.id = CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        sizes.value.clusterDim.x, sizes.value.clusterDim.y, sizes.value.clusterDim.z = cluster, 1, 1
        yield sizes
    if overlaps:
        early = CUlaunchAttribute()
        early.id = CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
        yield early


@cache
def _loaded(kernel: CudaKernel, constants: Constants) -> Any:
    """The kernel as the driver knows it, on this process's GPU; it may have all the shared memory there is."""
    from cuda.bindings import driver

    module = _checked(driver.cuModuleLoadData(kernel.cubin(constants)))
    function = _checked(driver.cuModuleGetFunction(module, kernel.name.encode()))
    of_function, of_gpu = driver.CUfunction_attribute, driver.CUdevice_attribute
    declared = _checked(driver.cuFuncGetAttribute(of_function.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function))
    most = of_gpu.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    most_bytes = _checked(driver.cuDeviceGetAttribute(most, _checked(driver.cuCtxGetDevice()))) - declared
    limit = of_function.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _checked(driver.cuFuncSetAttribute(function, limit, most_bytes))
    compilation.count(compilation.Kernel(kernel.name, constants))
    return function


def _checked(returned: tuple[Any, ...]) -> Any:
    """What a function of the bindings returned, of which the first is its status."""
    status, *values = returned
    if int(status) != 0:
        raise RuntimeError(f"CUDA: {status!r}")
    return values[0] if len(values) == 1 else tuple(values)
