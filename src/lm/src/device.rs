//! Where and in which precision a model computes.

use std::ffi::CStr;
use std::fmt;
use std::sync::Once;

use clap::ValueEnum;
use serde::Serialize;
use tch::{Cuda, Device, Kind};

use crate::LmError;
#[cfg(target_arch = "x86_64")]
use crate::{kernels, products::amx};

/// Device choice of a flag.
#[derive(ValueEnum, Serialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum DeviceChoice {
    /// CUDA where there is one.
    Auto,
    /// CPU.
    Cpu,
    /// CUDA.
    Cuda,
}

/// Precision choice of a flag.
#[derive(ValueEnum, Serialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum DtypeChoice {
    /// bf16 where the machine has it, else f32.
    Auto,
    /// float32.
    F32,
    /// bfloat16.
    Bf16,
}

/// A resolved device and precision.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Compute {
    /// Device.
    pub device: Device,
    /// Kind of weights and activations.
    pub kind: Kind,
}

impl Compute {
    /// Resolves the choices; loads libtorch's CUDA part at first use where there is one.
    pub fn resolve(device: DeviceChoice, dtype: DtypeChoice) -> Result<Self, LmError> {
        let device = match device {
            DeviceChoice::Cpu => Device::Cpu,
            DeviceChoice::Auto if cuda_is_available() => Device::Cuda(0),
            DeviceChoice::Auto => Device::Cpu,
            DeviceChoice::Cuda if cuda_is_available() => Device::Cuda(0),
            DeviceChoice::Cuda => {
                return Err(LmError::Usage(
                    "device cuda: no CUDA device was found\n\
                     help: use --device cpu, or run with a CUDA libtorch 2.11 (LIBTORCH) on a machine with a GPU"
                        .into(),
                ));
            }
        };
        let kind = match dtype {
            DtypeChoice::F32 => Kind::Float,
            DtypeChoice::Bf16 => Kind::BFloat16,
            DtypeChoice::Auto if device.is_cuda() || cpu_multiplies_bf16() => Kind::BFloat16,
            DtypeChoice::Auto => Kind::Float,
        };
        Ok(Self { device, kind })
    }
}

/// Device, precision and, of a CPU, its widest instructions: what results may differ by, if only by rounding.
impl fmt::Display for Compute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.kind == Kind::BFloat16 { "bf16" } else { "f32" };
        match self.device.is_cuda() {
            true => write!(f, "cuda, {kind}"),
            false => write!(f, "cpu, {kind}, {}", instructions(self.kind)),
        }
    }
}

/// The widest instructions of this CPU that anything here is compiled for and that compute in this kind.
fn instructions(kind: Kind) -> &'static str {
    #[cfg(target_arch = "x86_64")]
    match (kernels::has_avx2(), kernels::has_avx512()) {
        (_, true) if kind == Kind::BFloat16 && amx::is_supported() => return "amx",
        (_, true) if kind == Kind::BFloat16 && cpu_multiplies_bf16() => return "avx512bf16",
        (_, true) => return "avx512",
        (true, false) => return "avx2",
        (false, false) => {}
    }
    std::env::consts::ARCH
}

fn cuda_is_available() -> bool {
    load_cuda_part();
    Cuda::is_available()
}

/// Loads `libtorch_cuda.so` where there is one.
///
/// Nothing in our code refers to a symbol of it, so the linker leaves it out of the binary's needs and libtorch would
/// believe that there is no CUDA. The library registers itself when it is loaded and must never be unloaded.
fn load_cuda_part() {
    static ONCE: Once = Once::new();
    #[cfg(target_os = "linux")]
    ONCE.call_once(|| {
        // SAFETY: the name is a C string; running the initialisers of libtorch's own library is its documented use.
        unsafe {
            libc::dlopen(c"libtorch_cuda.so".as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL);
        }
    });
    #[cfg(not(target_os = "linux"))]
    ONCE.call_once(|| {});
}

/// A function of CUDA's runtime, which libtorch's CUDA part has loaded; null where there is none.
fn cuda_runtime(name: &CStr) -> *mut libc::c_void {
    // SAFETY: the name is a C string.
    unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) }
}

/// Bytes that are free on the CUDA device in use; `None` where no CUDA runtime answers.
///
/// `cudaError_t cudaMemGetInfo(size_t *free, size_t *total)` of CUDA's `cuda_runtime_api.h`, which tch does not pass on.
pub(crate) fn free_cuda_memory() -> Option<usize> {
    type MemGetInfo = unsafe extern "C" fn(*mut usize, *mut usize) -> libc::c_int;
    let symbol = cuda_runtime(c"cudaMemGetInfo");
    if symbol.is_null() {
        return None;
    }
    // SAFETY: the function of this name has this signature.
    let mem_get_info = unsafe { std::mem::transmute::<*mut libc::c_void, MemGetInfo>(symbol) };
    let (mut free, mut total) = (0, 0);
    // SAFETY: both pointers are to live values of the type that the call fills.
    let status = unsafe { mem_get_info(&mut free, &mut total) };
    (status == 0).then_some(free)
}

/// Major compute capability of the first CUDA device; `None` where no CUDA runtime answers.
///
/// `cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device)` of `cuda_runtime_api.h`.
pub(crate) fn cuda_generation() -> Option<i32> {
    type GetAttribute = unsafe extern "C" fn(*mut libc::c_int, libc::c_int, libc::c_int) -> libc::c_int;
    const COMPUTE_CAPABILITY_MAJOR: libc::c_int = 75;
    let symbol = cuda_runtime(c"cudaDeviceGetAttribute");
    if symbol.is_null() {
        return None;
    }
    // SAFETY: the function of this name has this signature.
    let get_attribute = unsafe { std::mem::transmute::<*mut libc::c_void, GetAttribute>(symbol) };
    let mut major = 0;
    // SAFETY: the pointer is to a live value of the type that the call fills.
    let status = unsafe { get_attribute(&mut major, COMPUTE_CAPABILITY_MAJOR, 0) };
    (status == 0).then_some(major)
}

/// Bytes of memory in this machine, or in its share that a container has; `None` where the system does not tell.
pub(crate) fn physical_memory() -> Option<usize> {
    // SAFETY: both calls take a number and return one.
    let (pages, bytes) = unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    let whole = usize::try_from(pages).ok()?.checked_mul(usize::try_from(bytes).ok()?)?;
    let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse().ok();
    let limit = number("/sys/fs/cgroup/memory.max").or_else(|| number("/sys/fs/cgroup/memory/memory.limit_in_bytes"));
    Some(limit.map_or(whole, |limit: usize| limit.min(whole)))
}

/// Whether the CPU has instructions for bf16 products. Without them bf16 is slower than f32.
#[cfg(target_arch = "x86_64")]
pub(crate) fn cpu_multiplies_bf16() -> bool {
    std::is_x86_feature_detected!("avx512bf16") && std::is_x86_feature_detected!("avx512vl")
}

/// Whether the CPU has instructions for bf16 products. Without them bf16 is slower than f32.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn cpu_multiplies_bf16() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_is_always_there() {
        let compute = Compute::resolve(DeviceChoice::Cpu, DtypeChoice::F32).unwrap();
        assert_eq!(compute, Compute { device: Device::Cpu, kind: Kind::Float });
    }

    #[test]
    fn auto_is_bf16_only_where_it_pays() {
        let compute = Compute::resolve(DeviceChoice::Cpu, DtypeChoice::Auto).unwrap();
        assert_eq!(compute.kind == Kind::BFloat16, cpu_multiplies_bf16());
    }

    #[test]
    fn a_missing_cuda_device_is_a_usage_error() {
        if !cuda_is_available() {
            let error = Compute::resolve(DeviceChoice::Cuda, DtypeChoice::Auto).unwrap_err();
            assert!(matches!(&error, LmError::Usage(message) if message.contains("help:")), "{error}");
        }
    }

    #[test]
    fn memory_is_known_of_what_is_there() {
        assert!(physical_memory().is_some_and(|bytes| bytes > 1 << 28));
        assert_eq!(free_cuda_memory().is_some(), cuda_is_available());
    }
}
