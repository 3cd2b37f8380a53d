//! The macro that writes the setters of options.

/// Writes setters for public fields. Structs of options can get new fields, so other crates cannot build them with a literal.
macro_rules! setters {
    ($type:ident $(<$life:lifetime>)? { $($setter:ident($field:ident: $value:ty)),+ $(,)? }) => {
        impl $(<$life>)? $type $(<$life>)? {
            $(
                #[doc = concat!("Sets [`", stringify!($field), "`](Self::", stringify!($field), ").")]
                #[must_use]
                pub fn $setter(mut self, $field: $value) -> Self {
                    self.$field = $field.into();
                    self
                }
            )+
        }
    };
}
