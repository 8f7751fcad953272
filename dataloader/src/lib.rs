//! dataloader
