//! The schema at run time: the descriptors of every message, embedded at build, and tables made from
//! them that walk faster than descriptors do.

use std::{collections::HashMap, sync::LazyLock};

use prost_reflect::{
    Cardinality, DescriptorPool, DynamicMessage, FieldDescriptor, Kind, MessageDescriptor, Value,
};

static DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
    DescriptorPool::decode(DESCRIPTORS).expect("the descriptor set was written by this crate's build script")
});

static SCHEMA: LazyLock<(Vec<Shape>, HashMap<String, u16>)> = LazyLock::new(|| {
    let messages: Vec<_> = pool().all_messages().filter(|m| m.package_name() == "criu").collect();
    let index: HashMap<String, u16> =
        (0u16..).zip(&messages).map(|(i, m)| (m.name().to_owned(), i)).collect();
    let hints = HintReader::new();
    let shapes = messages.iter().map(|message| Shape::new(message, &index, &hints)).collect();
    (shapes, index)
});

/// Descriptors of all messages, under the package `criu`.
pub fn pool() -> &'static DescriptorPool {
    &POOL
}

/// The table of a message, by its name without package.
pub fn shape(message: &str) -> Option<&'static Shape> {
    let (shapes, index) = &*SCHEMA;
    index.get(message).map(|&i| &shapes[usize::from(i)])
}

/// What is known of one message type.
#[derive(Debug)]
pub struct Shape {
    pub name: String,
    /// In the order of their numbers, which is that of the wire and of the human form.
    pub fields: Vec<Field>,
    /// All bits of required fields.
    pub required: u64,
    /// Place in [`Shape::fields`] plus one, by field number; 0 is none.
    by_number: Vec<u16>,
}

/// One field.
#[derive(Debug)]
pub struct Field {
    pub number: u32,
    pub name: String,
    pub ty: Type,
    pub repeated: bool,
    /// A list that is encoded without a tag before each value.
    pub packed: bool,
    /// One bit of [`Shape::required`], or 0.
    pub required: u64,
    pub hints: Hints,
}

/// Type of a field, as far as the wire and the human form tell types apart.
#[derive(Debug)]
pub enum Type {
    /// `int32`, `int64`, encoded as two's complement of 64 bit.
    Int {
        bits: u32,
    },
    /// `sint32`, `sint64`: sign in the lowest bit.
    ZigZag {
        bits: u32,
    },
    Uint {
        bits: u32,
    },
    Fixed {
        bits: u32,
        signed: bool,
    },
    Bool,
    String,
    Bytes,
    /// Names by number.
    Enum(Vec<(i32, String)>),
    Message(MessageRef),
}

/// A message type inside another.
#[derive(Debug, Clone, Copy)]
pub struct MessageRef(u16);

impl MessageRef {
    pub fn shape(self) -> &'static Shape {
        &SCHEMA.0[usize::from(self.0)]
    }
}

/// How the human form shows a number; see `proto/show.proto`.
#[derive(Debug, Default)]
pub struct Hints {
    pub hex: bool,
    pub flags: String,
    pub dev: bool,
    pub odev: bool,
    pub ipadd: bool,
    pub conv: String,
    pub dict: String,
}

impl Shape {
    fn new(message: &MessageDescriptor, index: &HashMap<String, u16>, hints: &HintReader) -> Self {
        let mut shape = Self { name: message.name().into(), fields: vec![], required: 0, by_number: vec![] };
        let mut descriptors: Vec<_> = message.fields().collect();
        descriptors.sort_by_key(FieldDescriptor::number);
        let mut bit = 1;
        for field in descriptors {
            let number = field.number() as usize;
            shape.by_number.resize(number + 1, 0);
            shape.by_number[number] = shape.fields.len() as u16 + 1;
            let mut required = 0;
            if field.cardinality() == Cardinality::Required {
                required = bit;
                shape.required |= bit;
                bit <<= 1;
            }
            shape.fields.push(Field {
                number: field.number(),
                name: field.name().into(),
                ty: Type::of(&field, index),
                repeated: field.is_list(),
                packed: field.is_packed(),
                required,
                hints: hints.of(&field),
            });
        }
        shape
    }

    /// The field with this number.
    pub fn field(&self, number: u32) -> Option<&Field> {
        let at = *self.by_number.get(number as usize)?;
        self.fields.get(usize::from(at).checked_sub(1)?)
    }
}

impl Type {
    fn of(field: &FieldDescriptor, index: &HashMap<String, u16>) -> Self {
        match field.kind() {
            Kind::Int32 => Type::Int { bits: 32 },
            Kind::Int64 => Type::Int { bits: 64 },
            Kind::Sint32 => Type::ZigZag { bits: 32 },
            Kind::Sint64 => Type::ZigZag { bits: 64 },
            Kind::Uint32 => Type::Uint { bits: 32 },
            Kind::Uint64 => Type::Uint { bits: 64 },
            Kind::Fixed32 => Type::Fixed { bits: 32, signed: false },
            Kind::Fixed64 => Type::Fixed { bits: 64, signed: false },
            Kind::Sfixed32 => Type::Fixed { bits: 32, signed: true },
            Kind::Sfixed64 => Type::Fixed { bits: 64, signed: true },
            Kind::Bool => Type::Bool,
            Kind::String => Type::String,
            Kind::Enum(names) => {
                Type::Enum(names.values().map(|v| (v.number(), v.name().to_owned())).collect())
            }
            Kind::Message(message) => match index.get(message.name()) {
                Some(&at) => Type::Message(MessageRef(at)),
                None => Type::Bytes,
            },
            // Floating point numbers do not occur in the schema (a test says so).
            Kind::Bytes | Kind::Float | Kind::Double => Type::Bytes,
        }
    }
}

/// Reads the custom option that carries the hints.
struct HintReader {
    extension: Option<prost_reflect::ExtensionDescriptor>,
}

impl HintReader {
    fn new() -> Self {
        Self { extension: pool().all_extensions().find(|e| e.full_name() == "criu.show") }
    }

    fn of(&self, field: &FieldDescriptor) -> Hints {
        let options = field.options();
        let Some(extension) = self.extension.as_ref().filter(|e| options.has_extension(e)) else {
            return Hints::default();
        };
        let value = options.get_extension(extension);
        let Some(hints) = value.as_message() else { return Hints::default() };
        let text = |hints: &DynamicMessage, name: &str| match hints.get_field_by_name(name).as_deref() {
            Some(Value::String(text)) => text.clone(),
            _ => String::new(),
        };
        let flag = |name| hints.get_field_by_name(name).and_then(|v| v.as_bool()).unwrap_or(false);
        Hints {
            hex: flag("hex"),
            dev: flag("dev"),
            odev: flag("odev"),
            ipadd: flag("ipadd"),
            flags: text(hints, "flags"),
            conv: text(hints, "conv"),
            dict: text(hints, "dict"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_hold_every_message() {
        for shape in &SCHEMA.0 {
            assert!(
                shape.required.leading_zeros() > 0,
                "{} has too many required fields for one word",
                shape.name
            );
            assert!(shape.by_number.len() < 4096, "{}", shape.name);
            for field in &shape.fields {
                assert_eq!(shape.field(field.number).map(|f| &f.name), Some(&field.name));
            }
        }
        let floats = pool().all_messages().filter(|m| m.package_name() == "criu").flat_map(|m| {
            m.fields()
                .filter(|f| matches!(f.kind(), Kind::Float | Kind::Double))
                .map(|f| f.full_name().to_owned())
                .collect::<Vec<_>>()
        });
        assert_eq!(floats.collect::<Vec<_>>(), Vec::<String>::new());
    }

    #[test]
    fn hints_are_read() {
        let vma = shape("vma_entry").unwrap();
        assert!(vma.field(1).unwrap().hints.hex);
        assert_eq!(vma.field(5).unwrap().hints.flags, "mmap.prot");
        assert!(!vma.field(3).unwrap().hints.hex);
        let ghost = shape("ghost_file_entry").unwrap().field(6).unwrap();
        assert!(ghost.hints.dev && ghost.hints.odev);
        assert!(shape("inet_sk_entry").unwrap().field(11).unwrap().hints.ipadd);
    }
}
