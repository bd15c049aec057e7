//! Pages between machines: the page server and those who talk to it.
//!
//! ```text
//! wire     the protocol's commands
//! conn     a connection, perhaps under TLS
//! socket   the socket below it
//! ahead    what it has received ahead
//! link     a dump's connection to the page server that takes its pages
//! receive  that page server
//! send     the other kind: serves pages to a lazy restore, from images or from frozen tasks
//! ```

mod ahead;
mod conn;
mod link;
mod receive;
mod send;
mod socket;
mod tls;
mod wire;

pub use conn::{Conn, Listener, room};
pub use link::Link;
pub use receive::receive;
pub use send::{Frozen, Pages, send};
pub use wire::{Command, LEN as MESSAGE_LEN, Message, Object, strange};

#[cfg(test)]
mod tests;
