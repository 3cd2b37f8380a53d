//! Types of GGUF files that nybble does not read, by name: those that ggml has withdrawn, and those of other programs.

/// A type that is not read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OtherType {
    pub(crate) name: &'static str,
    /// Where it comes from.
    pub(crate) origin: &'static str,
    /// What to take instead.
    pub(crate) advice: &'static str,
}

/// ik_llama.cpp's own types. Those whose names end in R and a number have rows interleaved for one CPU.
#[rustfmt::skip]
const IK_LLAMA: [(u32, &str); 59] = [
    (97, "Q8_0_X4"), (98, "Q8_1_X4"), (99, "Q8_2_X4"), (133, "Q6_0"), (134, "IQ1_BN"), (135, "IQ2_BN"),
    (136, "Q8_K64"), (137, "IQ2_K"), (138, "IQ3_K"), (139, "IQ4_K"), (140, "IQ5_K"), (141, "IQ6_K"),
    (142, "IQ2_TN"), (143, "IQ1_TN"), (144, "IQ4_KS"), (145, "IQ2_KS"), (146, "IQ4_KSS"), (147, "Q8_K16"),
    (148, "Q8_K32"), (149, "Q8_KR8"), (150, "Q8_K128"), (151, "Q8_KV"), (152, "IQ5_KS"), (153, "IQ2_KT"),
    (154, "IQ3_KT"), (155, "IQ4_KT"), (156, "IQ3_KS"), (157, "IQ2_KL"), (158, "IQ1_KT"), (202, "Q4_0_R8"),
    (206, "Q5_0_R4"), (208, "Q8_0_R8"), (210, "Q2_K_R4"), (211, "Q3_K_R4"), (212, "Q4_K_R4"), (213, "Q5_K_R4"),
    (214, "Q6_K_R4"), (216, "IQ2_XXS_R4"), (217, "IQ2_XS_R4"), (218, "IQ3_XXS_R4"), (219, "IQ1_S_R4"), (220, "IQ4_NL_R4"),
    (221, "IQ3_S_R4"), (222, "IQ2_S_R4"), (223, "IQ4_XS_R8"), (229, "IQ1_M_R4"), (230, "BF16_R16"), (233, "Q6_0_R4"),
    (335, "IQ2_BN_R4"), (337, "IQ2_K_R4"), (338, "IQ3_K_R4"), (339, "IQ4_K_R4"), (340, "IQ5_K_R4"), (344, "IQ4_KS_R4"),
    (352, "IQ5_KS_R4"), (353, "MXFP4_R8"), (397, "Q8_K_R16"), (398, "Q8_KV_R8"), (399, "Q8_K_R8"),
];

const WITHDRAWN: &str = ", which ggml has withdrawn";
const OF_IK_LLAMA: &str = ", which only ik_llama.cpp reads";

/// The type with this id, unless it is one of [`BlockType`](super::block::BlockType) or unknown.
pub(crate) fn by_id(id: u32) -> Option<OtherType> {
    let q4_0 = "a file in Q4_0, whose weights are rearranged while they load";
    let iq4_nl = "a file in IQ4_NL, whose weights are rearranged while they load";
    let (name, origin, advice) = match id {
        4 => ("Q4_2", WITHDRAWN, "a newer file, for example in Q4_0 or Q4_K"),
        5 => ("Q4_3", WITHDRAWN, "a newer file, for example in Q4_1 or Q4_K"),
        31 => ("Q4_0_4_4", WITHDRAWN, q4_0),
        32 => ("Q4_0_4_8", WITHDRAWN, q4_0),
        33 => ("Q4_0_8_8", WITHDRAWN, q4_0),
        36 => {
            // I2_S has this id, too.
            ("IQ4_NL_4_4", WITHDRAWN, iq4_nl)
        }
        37 => ("IQ4_NL_4_8", WITHDRAWN, iq4_nl),
        38 => ("IQ4_NL_8_8", WITHDRAWN, iq4_nl),
        _ => {
            let (_, name) = IK_LLAMA.iter().find(|(known, _)| *known == id)?;
            (*name, OF_IK_LLAMA, "a file that llama.cpp wrote, for example in Q4_K, IQ4_XS or IQ3_S")
        }
    };
    Some(OtherType { name, origin, advice })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::block::BlockType;

    #[test]
    fn ids_are_in_order_and_not_those_of_types_that_are_read() {
        assert!(IK_LLAMA.is_sorted_by(|(a, _), (b, _)| a < b));
        for id in 0..500 {
            // The parser asks for these only where the tensor does not have the size of the type that is read.
            assert!([36, 142].contains(&id) || by_id(id).is_none() || BlockType::from_id(id).is_none(), "{id}");
        }
        assert_eq!(by_id(139).map(|found| found.name), Some("IQ4_K"));
        assert!(by_id(43).is_none());
    }
}
