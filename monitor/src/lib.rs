//! What others see of a run: the small web server that ranks and launcher answer from, the live page, its form for
//! a terminal, and event files for TensorBoard.
//!
//! Refuses to know how a number comes about, and everything of training: it is handed numbers, and reads files.

mod folder;
mod history;
mod http;
mod page;
mod ranks;
mod tensorboard;
mod text;

pub use folder::FolderGauges;
pub use history::{COLUMNS, History, View};
pub use http::{Reply, Server, exposition};
pub use page::Page;
pub use ranks::RankView;
pub use tensorboard::{ExportError, Exported, export};
pub use text::render;
