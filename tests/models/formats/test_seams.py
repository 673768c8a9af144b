"""A serving format and a head architecture are one entry each: both are added here, and nothing else is changed."""

import json
from dataclasses import asdict, dataclass

import torch
from builders import make_batch, make_head, matrices
from fledge.conf.schema import ExportFormat
from fledge.eval.decoding.head_drafter import DraftDecoder
from fledge.eval.decoding.proposal import NewRows
from fledge.models.export import export
from fledge.models.formats.fields import AUX_IDS, EAGLE, TOP, Field
from fledge.models.formats.plain import head_tensors, load_head, plain_config, save_head, write_head_files
from fledge.models.formats.published import read_published_head
from fledge.models.formats.serving_formats import SERVING_FORMATS, Engine, ServingFormat
from fledge.models.formats.speculators import save_speculators
from fledge.models.head import architectures
from fledge.models.head.architectures import HeadArchitecture, build_head
from fledge.models.head.config import DraftHeadConfig
from fledge.models.head.draft_head import DraftHead
from fledge.models.head.vocabulary import VocabularyMap
from fledge.models.import_head import import_head
from fledge.models.verifier.weights import verifier_identity
from fledge.train.loss.unroll import unroll
from published_heads import SHAPE, VERIFIER, assert_same_head


def write_toy(folder, head, record, exported):
    """Write ids that count from 2, and tensors under names of their own."""
    values = plain_config(head.config, torch.float32)
    ids = [layer + 2 for layer in values.pop(EAGLE)[AUX_IDS]]
    tensors = head_tensors(head, head.state_dict(), torch.float32)
    named = {f"toy/{name}": tensor for name, tensor in tensors.items()}
    write_head_files(folder, named, {**values, "toy": True, AUX_IDS: ids}, record)


def read_toy(values, tensors):
    if "toy" not in values:
        return None
    layers = [k - 2 for k in values.pop(AUX_IDS)]
    del values["toy"]
    return {**values, EAGLE: {AUX_IDS: layers}}, {n.removeprefix("toy/"): tensor for n, tensor in tensors.items()}


TOY = ServingFormat(
    write_toy,
    engines=(
        Engine(
            "Toy",
            lambda exported: f"## Toy\n\ntoy {exported.folder}",
            lambda exported: ["it knows no window"] if exported.head.norm_output else [],
            ids_at=(TOP,),
            first_id=2,
            files=lambda exported: {"toy.txt": exported.verifier},
        ),
    ),
    first_ids={TOP: 2},
    library="toy",
    read=read_toy,
)


def test_a_format_is_one_entry(tmp_path, config, monkeypatch, capsys):
    monkeypatch.setitem(SERVING_FORMATS, "toy", TOY)
    folder, exported = tmp_path / "head", config.run_folder / "exports" / "toy"
    folder.mkdir()
    for norms, served in ((True, False), (False, True)):
        head = make_head(fc_norm=norms, norm_output=norms)
        save_head(folder, head, {"verifier": verifier_identity(config.verifier), "step": 0}, torch.float32)
        config.export.checkpoint, config.export.format = str(folder), ExportFormat.all
        export(config)
        said = capsys.readouterr().out
        assert (
            "read by no engine that serves" in said and "Toy: it knows no window. It is left out" in said
        ) is not served
        assert (config.run_folder / "exports" / "plain" / "trtllm.yaml").exists()
        if not served:
            assert not exported.exists()
            continue
        assert f"toy {exported}" in (exported / "SERVING.md").read_text()
        assert (exported / "toy.txt").exists()
        assert f"export: {exported}; more in" in said
        assert "library_name: toy" in (exported / "README.md").read_text()
        assert json.loads((exported / "config.json").read_text())[AUX_IDS] == [3, 5, 6]
        config.head_import.source, config.overwrite = str(exported), True
        import_head(config)
        assert_same_head(load_head(config.run_folder / "imports" / "toy")[0], head, torch.float32)


@dataclass(frozen=True)
class GatedConfig(DraftHeadConfig):
    """EAGLE-3, and by how much the state is scaled before it is fed onward."""

    gate: float = 1.0


class GatedHead(DraftHead):
    """Feeds a scaled state onward, and has a bias after it."""

    def __init__(self, config: GatedConfig, vocabulary: VocabularyMap | None = None) -> None:
        super().__init__(config, vocabulary)
        self.feedback_bias = torch.nn.Parameter(torch.full((config.hidden_size,), 0.1))

    def step(self, *args, **kwargs):
        state, normed = super().step(*args, **kwargs)
        return state * self.config.gate + self.feedback_bias, normed


GATED = HeadArchitecture(
    {"plain": "GatedHead", "speculators": "GatedDraftModel"},
    GatedConfig,
    GatedHead,
    (Field("gate", TOP, "gate", absent=lambda *_: 1.0),),
)


def gated_head() -> DraftHead:
    """A gated head with the weights of `make_head`."""
    head = make_head()
    gated = build_head(GatedConfig(**asdict(head.config), gate=0.5), VocabularyMap(head.d2t, head.t2d))
    gated.load_state_dict(head.state_dict(), strict=False)
    return gated


def test_an_architecture_is_one_entry_for_files(tmp_path, monkeypatch):
    monkeypatch.setattr(architectures, "ARCHITECTURES", [*architectures.ARCHITECTURES, GATED])
    head = gated_head()
    assert isinstance(head, GatedHead)
    save_head(tmp_path, head, {}, torch.float32)
    found = [load_head(tmp_path)[0], read_published_head(tmp_path, SHAPE).head]
    save_speculators(tmp_path, head, {}, torch.float32, VERIFIER, 3)
    found.append(read_published_head(tmp_path, SHAPE).head)
    for read in found:
        assert isinstance(read, GatedHead)
        assert read.config.gate == 0.5
        assert_same_head(read, head, torch.float32)


def test_an_architecture_is_one_entry_for_training_and_decoding(monkeypatch):
    monkeypatch.setattr(architectures, "ARCHITECTURES", [*architectures.ARCHITECTURES, GATED])
    head, (embedding, _), batch = gated_head(), matrices(), make_batch([9])
    batch.loss_mask[:] = True
    rows = batch.useful_rows(2)
    with torch.no_grad():
        first, second = (head.lm_head(states) for states in unroll(head, batch, rows, embedding))
        ungated = make_head()
        assert torch.equal(ungated.lm_head(unroll(ungated, batch, rows, embedding)[0]), first)
    row = int(rows.rows[rows.steps[1][-1]])  # its second step is fed the batch's token, as the decoder is below
    decoder = DraftDecoder(head, embedding, num_draft_tokens=2)
    known = torch.tensor([0]), torch.tensor([row + 1])
    decoder.extend(NewRows(batch.input_ids[None, 1 : row + 2], *known, row + 1), batch.states[0][None, : row + 1])
    torch.testing.assert_close(decoder.head.lm_head(decoder._normed)[0], first[rows.steps[1][-1]], rtol=1e-4, atol=1e-5)
    _, normed = decoder.feed(batch.input_ids[row + 2 : row + 3], decoder._state, 1, row + 2)
    torch.testing.assert_close(head.lm_head(normed)[0], second[-1], rtol=1e-4, atol=1e-5)
