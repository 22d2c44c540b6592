"""Program: contrastive data to a behavior vector, and the texts that tuning will learn from.

    python -m reptune_jax.extract --config=configs/sentiment.py --workdir=runs/sentiment

Writes `vector.safetensors` and `targets.jsonl` into the work folder; skips what is there.
"""

from reptune_jax import program
from reptune_jax.vectors.extraction import run

if __name__ == "__main__":
    program.main(run, __doc__)
