// Rounds to nearest, 8 bits per output row, in Rust without crates: the ABI as a foreign-function
// interface would see it. The structs below are those of quantmill/plugin.h and quantize_linear.h;
// fields this plugin does not use keep their place and their size.
#![allow(non_camel_case_types, dead_code)]

use std::ffi::{c_void, CStr};
use std::os::raw::c_char;
use std::ptr::null;

type qm_status = i32;
const OK: qm_status = 0;
const CANCELLED: qm_status = 1;
const INVALID_ARGUMENT: qm_status = 3;
const RESOURCE_EXHAUSTED: qm_status = 8;
const F32: i32 = 1;
const I32: i32 = 19;
const CPU: i32 = 1;

#[repr(C)]
#[derive(Clone, Copy)]
struct qm_device {
    kind: i32,
    index: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct qm_tensor {
    data: *mut c_void,
    dtype: i32,
    rank: i32,
    device: qm_device,
    shape: [i64; 4],
    stride: [i64; 4],
    flags: u64,
    reserved: [u64; 2],
}

#[repr(C)]
struct qm_named_tensor {
    name: *const c_char,
    tensor: qm_tensor,
}

#[repr(C)]
struct qm_call {
    struct_size: u64,
    host_data: *mut c_void,
    fail: extern "C" fn(*mut qm_call, qm_status, *const c_char) -> qm_status,
    log: extern "C" fn(*mut qm_call, i32, *const c_char),
    progress: extern "C" fn(*mut qm_call, f64) -> i32,
    scratch: extern "C" fn(*mut qm_call, qm_device, u64) -> *mut c_void,
    emit: extern "C" fn(
        *mut qm_call,
        u64,
        *const c_char,
        qm_device,
        i32,
        i32,
        *const i64,
        *mut qm_tensor,
    ) -> qm_status,
    opt_i64: extern "C" fn(*mut qm_call, *const c_char) -> i64,
    opt_f64: extern "C" fn(*mut qm_call, *const c_char) -> f64,
    opt_str: extern "C" fn(*mut qm_call, *const c_char) -> *const c_char,
    seed: u64,
    device: qm_device,
    cuda_stream: *mut c_void,
    host_ext: extern "C" fn(*mut qm_call, *const c_char) -> *const c_void,
}

#[repr(C)]
struct qm_linear_info {
    struct_size: u64,
    name: *const c_char,
    role: *const c_char,
    out_features: i64,
    in_features: i64,
    weight_dtype: i32,
    input_group: i32,
    scale_dtype: i32,
    reserved: i32,
}

#[repr(C)]
struct qm_quant_plan {
    struct_size: u64,
    stats: *const c_void,
    stat_count: u64,
    scratch_bytes: u64,
    scratch_bytes_shared: u64,
    format_id: *const c_char,
    flops: f64,
}

#[repr(C)]
struct qm_packed {
    format_id: *const c_char,
    format_json: *const c_char,
    tensors: *const qm_named_tensor,
    tensor_count: u64,
    out_features: i64,
    in_features: i64,
}

#[repr(C)]
struct qm_quantize_linear {
    struct_size: u64,
    plan: extern "C" fn(*mut qm_call, *const qm_linear_info, *mut qm_quant_plan) -> qm_status,
    run: extern "C" fn(
        *mut qm_call,
        *const qm_linear_info,
        *const qm_tensor,
        *const c_void,
        *mut qm_packed,
    ) -> qm_status,
    run_group: *const c_void,
}

#[repr(C)]
struct qm_method {
    struct_size: u64,
    id: *const c_char,
    version: *const c_char,
    summary: *const c_char,
    options: *const c_void,
    option_count: u64,
    flags: u64,
    ext: extern "C" fn(*const qm_method, *const c_char) -> *const c_void,
}

#[repr(C)]
pub struct qm_plugin {
    struct_size: u64,
    abi_major: u32,
    abi_minor: u32,
    min_host_minor: u32,
    method_count: u32,
    methods: *const *const qm_method,
    vendor: *const c_char,
    license: *const c_char,
    build_info: *const c_char,
}

// Static constant data, the same for every thread.
struct Static<T>(T);
unsafe impl<T> Sync for Static<T> {}

macro_rules! text {
    ($text:expr) => {
        concat!($text, "\0").as_ptr() as *const c_char
    };
}

extern "C" fn plan(
    _call: *mut qm_call,
    _info: *const qm_linear_info,
    out: *mut qm_quant_plan,
) -> qm_status {
    let out = unsafe { &mut *out };
    out.scratch_bytes = 2 * std::mem::size_of::<qm_named_tensor>() as u64;
    out.format_id = text!("qm.fmt.affine-int/1");
    OK
}

extern "C" fn run(
    call: *mut qm_call,
    info: *const qm_linear_info,
    weight: *const qm_tensor,
    _stats: *const c_void,
    out: *mut qm_packed,
) -> qm_status {
    let (c, info, w) = unsafe { (&*call, &*info, &*weight) };
    if w.device.kind != CPU || w.dtype != F32 || w.rank != 2 {
        return (c.fail)(call, INVALID_ARGUMENT, text!("want a rank-2 f32 weight on the CPU"));
    }
    let (n, k) = (info.out_features, info.in_features);
    let words = (k + 3) / 4;
    let mut codes: qm_tensor = *w;
    let mut scale: qm_tensor = *w;
    for (name, dtype, columns, tensor) in [
        (text!("codes"), I32, words, &mut codes),
        (text!("scale"), F32, 1, &mut scale),
    ] {
        let shape = [n, columns];
        let status = (c.emit)(call, 0, name, w.device, dtype, 2, shape.as_ptr(), tensor);
        if status != OK {
            return status;
        }
    }
    for i in 0..n {
        if (c.progress)(call, i as f64 / n as f64) != 0 {
            return CANCELLED;
        }
        let row = |j: i64| unsafe {
            *(w.data as *const f32).offset((i * w.stride[0] + j * w.stride[1]) as isize)
        };
        let top = (0..k).fold(0f32, |top, j| top.max(row(j).abs()));
        let step = if top > 0.0 { top / 127.0 } else { 1.0 };
        let bytes = unsafe {
            *(scale.data as *mut f32).offset(i as isize) = step;
            let first = (codes.data as *mut u8).offset((i * words * 4) as isize);
            std::slice::from_raw_parts_mut(first, (words * 4) as usize)
        };
        bytes.fill(0);
        for j in 0..k {
            // Adding and taking away 1.5 * 2^23 rounds to nearest, ties to even.
            const MAGIC: f32 = 12582912.0;
            bytes[j as usize] = (((row(j) / step) + MAGIC) - MAGIC + 128.0) as u8;
        }
    }
    let bytes = 2 * std::mem::size_of::<qm_named_tensor>() as u64;
    let list = (c.scratch)(call, w.device, bytes) as *mut qm_named_tensor;
    if list.is_null() {
        return (c.fail)(call, RESOURCE_EXHAUSTED, text!("no scratch for two tensors"));
    }
    unsafe {
        list.write(qm_named_tensor { name: text!("codes"), tensor: codes });
        list.add(1).write(qm_named_tensor { name: text!("scale"), tensor: scale });
        out.write(qm_packed {
            format_id: text!("qm.fmt.affine-int/1"),
            format_json: text!("{\"bits\":8,\"group_size\":-1,\"zero\":\"none\"}"),
            tensors: list,
            tensor_count: 2,
            out_features: n,
            in_features: k,
        });
    }
    OK
}

static QUANTIZE: Static<qm_quantize_linear> = Static(qm_quantize_linear {
    struct_size: std::mem::size_of::<qm_quantize_linear>() as u64,
    plan,
    run,
    run_group: null(),
});

extern "C" fn ext(_method: *const qm_method, id: *const c_char) -> *const c_void {
    match unsafe { CStr::from_ptr(id) }.to_bytes() {
        b"qm.quantize-linear/1" => &QUANTIZE.0 as *const _ as *const c_void,
        _ => null(),
    }
}

static METHOD: Static<qm_method> = Static(qm_method {
    struct_size: std::mem::size_of::<qm_method>() as u64,
    id: text!("org.example.rtn-rust"),
    version: text!("1.0.0"),
    summary: text!("rounds rows"),
    options: null(),
    option_count: 0,
    flags: 1, // QM_METHOD_DETERMINISTIC
    ext,
});
static METHODS: Static<[*const qm_method; 1]> = Static([&METHOD.0]);
static PLUGIN: Static<qm_plugin> = Static(qm_plugin {
    struct_size: std::mem::size_of::<qm_plugin>() as u64,
    abi_major: 1,
    abi_minor: 0,
    min_host_minor: 0,
    method_count: 1,
    methods: METHODS.0.as_ptr(),
    vendor: text!("example"),
    license: text!("Apache-2.0"),
    build_info: text!("rustc"),
});

#[no_mangle]
pub extern "C" fn qm_plugin_entry_v1() -> *const qm_plugin {
    &PLUGIN.0
}
