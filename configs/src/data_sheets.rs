//! What NVIDIA's data sheets say that GPUs multiply: the one table that plans, MFU and checks read. Knows no
//! devices; whoever asks has their names.

/// bf16 products per second of GPUs by the start of the name that their driver gives, FLOP/s, dense, with fp32
/// sums; the sheets' figures "with sparsity" are twice these. The longer name stands before the shorter.
const BF16: [(&str, f64); 15] = [
    ("NVIDIA A10G", 70e12),
    ("NVIDIA A100", 312e12),
    ("NVIDIA A10", 125e12),
    ("NVIDIA A30", 165e12),
    ("NVIDIA A40", 149.7e12),
    ("NVIDIA B200", 2250e12),
    ("NVIDIA GH200", 989.5e12),
    ("NVIDIA H100 NVL", 835.5e12),
    ("NVIDIA H100 PCIe", 756.5e12),
    ("NVIDIA H100", 989.5e12), // SXM: "NVIDIA H100 80GB HBM3"
    ("NVIDIA H200 NVL", 835.5e12),
    ("NVIDIA H200", 989.5e12),
    ("NVIDIA H800", 989.5e12),
    ("NVIDIA L40S", 362e12),
    ("NVIDIA L4", 121e12),
];

/// The data sheet's bf16 rate of a GPU by its name, FLOP/s; `None` for one that is not known here.
pub fn data_sheet_bf16(name: &str) -> Option<f64> {
    BF16.iter().find(|(start, _)| name.starts_with(start)).map(|(_, rate)| *rate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_sheets_tell_variants_of_a_gpu_apart() {
        let rate = |name| data_sheet_bf16(name).map(|rate| rate / 1e12);
        assert_eq!(rate("NVIDIA H100 80GB HBM3"), Some(989.5));
        assert_eq!(rate("NVIDIA H100 PCIe"), Some(756.5));
        assert_eq!(rate("NVIDIA A100-SXM4-80GB"), Some(312.0));
        assert_eq!(rate("NVIDIA A10"), Some(125.0));
        assert_eq!(rate("NVIDIA A10G"), Some(70.0));
        assert_eq!(rate("NVIDIA H200"), Some(989.5));
        assert_eq!(rate("NVIDIA L40S"), Some(362.0));
        assert_eq!(rate("NVIDIA GeForce GTX 1080"), None);
    }
}
