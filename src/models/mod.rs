//! CLIP, UNet, VAE, tokenizer and the loading of model folders.
