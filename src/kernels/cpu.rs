//! What the CPU calls itself.

/// The name of the CPU's model. `None` where neither the CPU nor the system has one.
pub(crate) fn name() -> Option<String> {
    #[cfg(target_arch = "x86_64")]
    let found = Some(brand());
    #[cfg(all(target_os = "macos", not(target_arch = "x86_64")))]
    let found = crate::system::macos::text(c"machdep.cpu.brand_string");
    #[cfg(not(any(target_arch = "x86_64", target_os = "macos")))]
    let found = None::<String>;
    let found = found?;
    let trimmed = found.trim_matches(|letter: char| letter.is_whitespace() || letter == '\0');
    (!trimmed.is_empty()).then(|| trimmed.to_owned())
}

/// The brand string of CPUID, padded with zeros. Empty where there is none.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, unused_unsafe, reason = "reading a leaf was unsafe in earlier versions of Rust")]
fn brand() -> String {
    use std::arch::x86_64::__cpuid;
    let mut words = vec![];
    // SAFETY: every CPU with 64-bit instructions has CPUID, and the leaves are read only if they exist.
    unsafe {
        if __cpuid(0x8000_0000).eax >= 0x8000_0004 {
            for leaf in 0x8000_0002..=0x8000_0004 {
                let leaf = __cpuid(leaf);
                words.extend([leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]);
            }
        }
    }
    let name: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    String::from_utf8_lossy(&name).into_owned()
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    #[test]
    #[cfg(target_os = "linux")]
    fn the_name_is_the_systems() {
        let known = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let line = known.lines().find_map(|line| line.strip_prefix("model name")).unwrap();
        let (_, name) = line.split_once(':').unwrap();
        assert_eq!(super::name().as_deref(), Some(name.trim()));
    }
}
