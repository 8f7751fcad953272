# Logits of an exported model by transformers: FOLDER, a file for them, and tokens as JSON. Little-endian fp32.
import json
import sys

import torch
from transformers import AutoModelForCausalLM

folder, out, tokens = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
with torch.no_grad():
    logits = model(torch.tensor(json.loads(tokens))).logits
with open(out, "wb") as file:
    file.write(logits.float().contiguous().numpy().astype("<f4").tobytes())
