//! Elementary functions under their usual names, from the standard library.
//!
//! Accounting may differ in the last bits between platforms, unlike noise, which takes its functions from `libm`; the
//! standard library's are several times faster.

macro_rules! functions {
    ($($name:ident = $method:ident),*) => {
        $(
            /// The standard library's function of that meaning.
            #[inline]
            pub fn $name(x: f64) -> f64 {
                x.$method()
            }
        )*
    };
}

functions!(exp = exp, log = ln, expm1 = exp_m1, log1p = ln_1p, sqrt = sqrt, floor = floor, ceil = ceil, exp2 = exp2);
