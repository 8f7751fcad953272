# Logits of an exported model by transformers: FOLDER, a file for them, and tokens as JSON. Little-endian fp32.
import json
import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

folder, out, tokens = sys.argv[1:]
masked = AutoConfig.from_pretrained(folder).model_type == "bert"
model = (AutoModelForMaskedLM if masked else AutoModelForCausalLM).from_pretrained(folder).float().eval()
with torch.no_grad():
    logits = model(torch.tensor(json.loads(tokens))).logits
with open(out, "wb") as file:
    file.write(logits.float().contiguous().numpy().astype("<f4").tobytes())
