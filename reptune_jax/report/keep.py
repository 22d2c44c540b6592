"""What is kept of a study when its folder is gone: config, tables, per-item results, provenance.

results/sentiment/          a study folder again: `reptune report results/sentiment` reads it
  README.md                 where it comes from, and every table of the report
  config.json
  results/items.parquet     unless it is large
"""

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from reptune_jax import folder as folders
from reptune_jax.evals.results import SCHEMA
from reptune_jax.hub.export import all_or_nothing
from reptune_jax.hub.side_files import public_name
from reptune_jax.report import markdown
from reptune_jax.report.study import Study

_LARGE = 4 << 20  # bytes of per-item results


def keep(study: Study, to: Path, note: str = "") -> Path:
    """Writes what is kept into a new folder; `note` is how it came about: command, machine, time.

    Raises:
      ValueError: the folder is there and not empty.
    """
    with all_or_nothing(to) as scratch:
        kept = folders.Study(scratch)
        config = json.loads(json.dumps(study.config))
        values = config.setdefault("config", {})
        values |= {key: public_name(str(values.get(key, ""))) for key in ("model", "behavior")}
        for one in (values.get("loss") or {}).get("also", {}).values():
            one["folder"] = public_name(one["folder"])
        kept.config.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        kept.items.parent.mkdir()
        rows = pa.Table.from_pandas(study.rows[SCHEMA.names], SCHEMA, preserve_index=False)
        pq.write_table(rows, kept.items, compression="zstd")
        digest = hashlib.sha256(kept.items.read_bytes()).hexdigest()
        items = f"{len(study.rows):,} per-item results, sha256 {digest[:16]}"
        if kept.items.stat().st_size > _LARGE:
            kept.items.unlink()
            items += " (not kept: too large)"
        versions = ", ".join(f"{k} {v}" for k, v in config.get("versions", {}).items())
        about = [
            note,
            f"{values['model']}, {values['behavior']}, seeds "
            + ", ".join(map(str, sorted(set(study.rows.seed)))),
            f"commit {config.get('commit') or 'unknown'}, {config.get('device', 'device unknown')}",
            versions,
            items,
        ]
        lines = [f"# {to.name}", "", *(f"- {line}" for line in about if line), ""]
        text = "\n".join([*lines, markdown.render(study)])
        (scratch / "README.md").write_text(text, encoding="utf-8")
    return to
