//! Images in the form in which the program ip saves and restores: a number for the kind, then messages of the
//! kernel as they came (`ip addr save`, `ip route save`, `ip rule save`).

use rcriu_images::{ImageDir, ImageKind};

use super::{netlink::Message, raw};
use crate::error::{Error, Result};

/// What such an image holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Form {
    pub(super) image: ImageKind,
    /// The first word.
    magic: u32,
    /// Type of all its messages.
    message: u16,
    /// Bytes before the attributes of each.
    head: usize,
}

const ROUTE: Form = Form { image: ImageKind::Route, magic: 0x4531_1224, message: 24, head: 12 };
pub(super) const ADDRESSES: Form =
    Form { image: ImageKind::Ifaddr, magic: 0x4736_1222, message: 20, head: 8 };
pub(super) const ROUTES: Form = ROUTE;
pub(super) const ROUTES6: Form = Form { image: ImageKind::Route6, ..ROUTE };
pub(super) const RULES: Form = Form { image: ImageKind::Rule, magic: 0x7170_6986, message: 32, head: 12 };

impl Form {
    /// Writes the image, also if there are no messages.
    pub(super) fn write(&self, images: &ImageDir, id: u32, messages: &[Message]) -> Result<()> {
        let mut out = images.writer(self.image, id.into());
        out.write_raw(&self.magic.to_ne_bytes())?;
        for message in messages {
            out.write_raw(message.bytes())?;
        }
        Ok(out.finish()?)
    }

    /// Reads the image; `None` if there is none.
    ///
    /// # Errors
    /// Another kind of image, damaged messages, messages that do not belong there.
    pub(super) fn read(&self, images: &ImageDir, id: u32) -> Result<Option<Vec<Message>>> {
        let Some(bytes) = raw::read(images, self.image, id)? else { return Ok(None) };
        let name = self.image.file_name(id.into());
        if bytes.is_empty() {
            return Ok(None);
        }
        let rest = bytes
            .strip_prefix(&self.magic.to_ne_bytes())
            .ok_or_else(|| Error::image(format!("{name} does not begin with {:#x}", self.magic)))?;
        let all = Message::all(rest, &name)?;
        match all.iter().find(|m| m.kind() != self.message || m.body().len() < self.head) {
            Some(odd) => Err(Error::image(format!("{name} has a message of type {} in it", odd.kind()))),
            None => Ok(Some(all)),
        }
    }
}
