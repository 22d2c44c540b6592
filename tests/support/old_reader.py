"""What an older transformers (4.57) reads of a folder: run by its own interpreter, as JSON.

The interpreter is named by REPTUNE_OLD_PYTHON; without one the tests look at the keys it reads.
"""

import json
import os
import subprocess
import sys

PYTHON = os.environ.get("REPTUNE_OLD_PYTHON")
TEXTS = ["Is it True?", " hi world", "<|im_start|>user\nhi<|im_end|>\n"]
CHAT = [{"role": "user", "content": "Is 12 even?"}]


def read(folder, python=PYTHON):
    """Ids of TEXTS and CHAT, logits of the last, the text that follows it, what config says."""
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [python, __file__, str(folder)]
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=clean)
    return json.loads(out.stdout.splitlines()[-1])


def main(folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, __version__

    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Its other ways to compute attention leave out Gemma 2's caps.
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    model = model.float().eval()
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits[0, -1]
        greedy = {"do_sample": False, "repetition_penalty": 1.0}  # whatever the folder asks for
        new = model.generate(ids, max_new_tokens=8, **greedy)[0, ids.shape[1] :]
    found = {
        "version": __version__,
        "ids": [tokenizer.encode(t) for t in TEXTS],
        "chat": ids[0].tolist(),
        "logits": logits.tolist(),
        "new": new.tolist(),
        "dtype": str(AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto").dtype),
        "eos": tokenizer.eos_token_id,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
