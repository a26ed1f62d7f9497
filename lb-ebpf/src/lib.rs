//! Nothing: the kernel programs are the binary of this package. See `main.rs`.
#![no_std]
