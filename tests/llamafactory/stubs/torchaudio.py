"""In place of torchaudio, where it does not fit the torch that is installed; LLaMA-Factory imports it at its top."""
