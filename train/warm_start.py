"""Training that goes on from a head trained before, by fledge or elsewhere (`fledge import`)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from ..conf.schema import Config
from ..models.formats.plain import load_head
from ..models.head.draft_head import DraftHead
from ..models.verifier.weights import check_identity


def trained_head(config: Config) -> DraftHead:
    """Read the head at `train.init_from`, with its draft vocabulary.

    Raises:
        ValueError: it was trained for another verifier, or options of `draft` contradict it (null never does).
    """
    assert config.train.init_from
    if Path(config.train.init_from).resolve().is_relative_to(config.training_folder.resolve()):
        raise ValueError(f"train.init_from must lie outside {config.training_folder}, which it would start: copy it")
    head, record = load_head(Path(config.train.init_from))
    check_identity(record["verifier"], config.verifier, config.train.init_from, "set the verifier it was trained for")
    has = {**dataclasses.asdict(head.config), "vocab_size": head.config.draft_vocab_size}
    has["aux_layers"] = list(head.config.aux_layers)
    changes = [
        f"draft.{name}={json.dumps(has[name])}"
        for name, asked in dataclasses.asdict(config.draft).items()
        if name in has and asked is not None and asked != has[name]
    ]
    if changes:
        raise ValueError(f"draft must describe the head at train.init_from: set {' '.join(changes)}")
    return head
