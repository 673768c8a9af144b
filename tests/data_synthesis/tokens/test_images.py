"""Conversations with images: their tokens are the processor's, and their states those of the model that sees them."""

from pathlib import Path

import pytest
import torch
import transformers
from builders import conversations_run, recorded_sequence
from fledge.conf.schema import Device, Dtype, HiddenStates, TooLong, VerifierConfig
from fledge.data_synthesis.dump import dump
from fledge.data_synthesis.preview import preview
from fledge.data_synthesis.states.transformers_engine import TransformersEngine
from fledge.data_synthesis.store.shard import ImageRecord, Sample
from fledge.data_synthesis.store.store import HiddenStateStore
from fledge.data_synthesis.tokens.chat_template import NoExactSpanError
from fledge.data_synthesis.tokens.image_tokens import ImageReader
from fledge.data_synthesis.tokens.images import UnreadableImagesError, load_image
from fledge.data_synthesis.tokens.sequences import SequenceReader, leading_answers
from fledge.models.verifier.model import Verifier
from fledge.train.data.training_data import Split
from image_verifiers import LLAMA4_TOKENS, asked, conversation, data_url, make_pictures, save_llama4, save_qwen3_vl
from PIL import Image


@pytest.fixture(scope="module")
def llama4(tmp_path_factory, tiny_verifier_folder) -> VerifierConfig:
    return save_llama4(tmp_path_factory.mktemp("llama4"), tiny_verifier_folder)


@pytest.fixture(scope="module")
def qwen3_vl(tmp_path_factory, tiny_verifier_folder) -> VerifierConfig:
    return save_qwen3_vl(tmp_path_factory.mktemp("qwen3_vl"), tiny_verifier_folder)


@pytest.fixture(params=["llama4", "qwen3_vl"])
def config(request) -> VerifierConfig:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[str]:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


def by_the_processor(config, record, addresses):
    """What the processor makes of the whole conversation, in its own way."""
    processor = transformers.AutoProcessor.from_pretrained(config.path)
    kinds = {"image_url": "image"}
    messages = [
        {**m, "content": [{**p, "type": kinds.get(p["type"], p["type"])} for p in m["content"]]}
        if isinstance(m["content"], list)
        else m
        for m in record["messages"]
    ]
    text = processor.apply_chat_template(messages, tokenize=False)
    images = [Image.open(address).convert("RGB") for address in addresses]
    return processor(text=[text], images=images, add_special_tokens=False, return_tensors="pt")


def sample_of(sequence, name="s/1"):
    mask = torch.zeros(len(sequence.token_ids), dtype=torch.uint8)
    for start, end in sequence.answers:
        mask[start:end] = 1
    tokens = torch.tensor(sequence.token_ids, dtype=torch.int32)
    return Sample(name, tokens, mask, images=tuple(image.address for image in sequence.images))


def answers_of(reader, sequence):
    return [reader.tokenizer.decode(sequence.token_ids[start:end]) for start, end in sequence.answers]


def assert_states(config, inputs, states, layers, aux, last):
    """Hold recorded states against the model's own hidden states.

    Qwen3-VL adds images' features to what its first layers, two here, put out: there the next layer's input counts.
    """
    assert torch.equal(last, states[-1][0])
    for layer, found in zip(layers, aux.split(last.shape[-1], dim=-1), strict=True):
        expected = states[layer + 1][0]
        if "qwen3_vl" in config.path and layer < 2:
            image = inputs["mm_token_type_ids"][0] == 1
            assert (found[image] != expected[image]).any(-1).all()
            found, expected = found[~image], expected[~image]
        assert torch.equal(found, expected), layer


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_tokens_are_the_processors_and_no_placeholder_is_counted(config, pictures, number):
    record = conversation(asked(*pictures[:number]), "A blue one.")
    reader = SequenceReader(config)
    (sequence,) = reader.read(record)
    expected = by_the_processor(config, record, pictures[:number])["input_ids"][0].tolist()
    assert sequence.token_ids == expected[: len(sequence.token_ids)]
    assert len(expected) == len(sequence.token_ids)
    assert answers_of(reader, sequence) == ["A blue one.<|end|>"]
    assert [image.address for image in sequence.images] == pictures[:number]
    marks = reader.tokenizer.convert_tokens_to_ids([*LLAMA4_TOKENS, "<|image_pad|>"])
    counted = sample_of(sequence).loss_mask.bool()
    assert not {*torch.tensor(sequence.token_ids)[counted].tolist()} & {m for m in marks if m is not None}
    for image in sequence.images:
        text = reader.tokenizer.decode(sequence.token_ids[slice(*image.span)])
        assert text.startswith(("<|image_start|>", "<|image_pad|>"))
        assert text.endswith(("<|image_end|>", "<|image_pad|>"))


def test_a_large_image_is_cut_into_tiles_with_separators(llama4, pictures):
    reader = SequenceReader(llama4)
    (sequence,) = reader.read(conversation(asked(pictures[3]), "So."))
    (image,) = sequence.images
    row = "<|patch|>" * 1 + "<|tile_x_separator|>" + "<|patch|>" * 1 + "<|tile_y_separator|>"
    row = row.replace("<|patch|>", "<|patch|>" * 4)
    whole = "<|image_start|>" + row * 2 + "<|image|>" + "<|patch|>" * 4 + "<|image_end|>"
    assert reader.tokenizer.decode(sequence.token_ids[slice(*image.span)]) == whole


def test_images_of_later_turns_come_with_their_turns_and_go_with_them(config, pictures):
    record = conversation("Hello.", "Hi.", asked(*pictures[:2]), "Two.", asked(pictures[3], text="And?"), "Three.")
    reader = SequenceReader(config)
    sequences = reader.read(record)
    (sequence,) = sequences
    assert answers_of(reader, sequence) == ["Hi.<|end|>", "Two.<|end|>", "Three.<|end|>"]
    assert sequence.token_ids == by_the_processor(config, record, [*pictures[:2], pictures[3]])["input_ids"][0].tolist()
    cuts = [leading_answers(sequences, number)[0] for number in (1, 2, 3)]
    assert [len(cut.images) for cut in cuts] == [0, 2, 3]
    assert (
        leading_answers(reader.read(record), 1)[0].token_ids == reader.read(conversation("Hello.", "Hi."))[0].token_ids
    )


def test_states_are_those_of_the_model_given_the_processors_inputs(config, pictures):
    records = [
        conversation(asked(*pictures[:3]), "A red one.", "Sure?", "Yes."),
        conversation("Hello.", "Hi.", asked(pictures[3]), "Large."),
        conversation("Only words here.", "Yes, only words."),
        conversation("More words.", "No."),
        conversation(asked(*pictures), "Five."),
    ]
    addresses = [pictures[:3], [pictures[3]], [], [], pictures]
    reader, verifier = SequenceReader(config), Verifier.load(config, [0, 1, 4])
    samples = [sample_of(reader.read(record)[0], str(number)) for number, record in enumerate(records)]
    engine = TransformersEngine(verifier, 64, ImageReader(config))
    read = {number: (aux, last) for number, aux, last in engine.read(samples)}
    assert sorted(read) == [0, 1, 2, 3, 4]
    for number in (0, 1, 4):
        inputs = by_the_processor(config, records[number], addresses[number])
        with torch.no_grad():
            floats = {name: value.float() for name, value in inputs.items() if value.is_floating_point()}
            states = verifier.model(**{**inputs, **floats}, output_hidden_states=True, use_cache=False).hidden_states
        aux, last = read[number]
        assert_states(config, inputs, states, (0, 1, 4), aux, last)
    alone = list(TransformersEngine(Verifier.load(config, [0, 1, 4]), 64).read(samples[2:4]))
    for number, aux, last in alone:
        assert torch.equal(read[number + 2][0], aux)
        assert torch.equal(read[number + 2][1], last)


def test_states_after_an_image_tell_what_is_in_it(config, pictures, tmp_path):
    Image.new("RGB", Image.open(pictures[0]).size, "red").save(tmp_path / "red.png")
    reader, engine = SequenceReader(config), TransformersEngine(Verifier.load(config), 64, ImageReader(config))
    samples = [
        sample_of(reader.read(conversation(asked(a), "So."))[0]) for a in (pictures[0], str(tmp_path / "red.png"))
    ]
    assert torch.equal(samples[0].input_ids, samples[1].input_ids)
    (_, _, noise), (_, _, red) = engine.read(samples)
    assert (noise[-1] - red[-1]).abs().max() > 1e-3 * red[-1].abs().max()


def test_recorded_tokens_are_taken_expanded_or_not(config, pictures):
    record = conversation(asked(*pictures[:2]), "Two.", asked(pictures[3]), "One more.")
    reader = SequenceReader(config)
    (sequence,) = reader.read(record)
    expanded = recorded_sequence(sequence.token_ids, *sequence.answers)
    assert reader.read({**record, "sequences": [expanded]}) == [sequence]

    placeholder = reader.tokenizer.convert_tokens_to_ids(["<|image|>", "<|image_pad|>"])
    placeholder = next(token for token in placeholder if token is not None)
    tokens, spans = list(sequence.token_ids), list(sequence.answers)
    for image in reversed(sequence.images):
        start, end = image.span
        tokens[start:end] = [placeholder]
        spans = [tuple(b - (end - start - 1) * (b > start) for b in span) for span in spans]
    assert len(tokens) < len(sequence.token_ids)
    assert reader.read({**record, "sequences": [recorded_sequence(tokens, *spans)]}) == [sequence]

    first, _ = spans
    halves = [recorded_sequence(tokens[: first[1]], first), recorded_sequence(tokens, spans[1])]
    assert [len(half.images) for half in reader.read({**record, "sequences": halves})] == [2, 3]

    for wrong in ([*tokens, placeholder], [*sequence.token_ids, placeholder], tokens[-9:]):
        with pytest.raises(NoExactSpanError, match="its tokens are not those that the processor writes"):
            reader.read({**record, "sequences": [recorded_sequence(wrong, (1, 2), (3, 4))]})


def test_an_answer_that_holds_an_image_is_refused(llama4, pictures):
    record = conversation(asked(pictures[0]), "It.")
    reader = SequenceReader(llama4)
    (sequence,) = reader.read(record)
    end = sequence.images[0].span[1]
    with pytest.raises(NoExactSpanError, match="an answer holds tokens of an image"):
        reader.read({**record, "sequences": [recorded_sequence(sequence.token_ids, (end - 1, end + 1))]})
    with pytest.raises(NoExactSpanError, match=r"rendered with 2 of <\|image\|> for 1 images"):
        reader.read(conversation(asked(pictures[0]), "I see <|image|>."))
    with pytest.raises(NoExactSpanError, match=r"rendered with 2 of <\|image\|> for 1 images"):
        reader.read(conversation(asked(pictures[0], text="What is <|image|>?"), "That."))


def test_files_urls_of_files_and_of_data_are_one_image(llama4, pictures, monkeypatch):
    monkeypatch.chdir(Path(pictures[1]).parent)
    forms = [pictures[1], "1.png", Path(pictures[1]).as_uri(), data_url(pictures[1])]
    assert len({load_image(form).tobytes() for form in forms}) == 1
    (sequence,) = SequenceReader(llama4).read(conversation(asked(*forms), "So."))
    assert [image.address for image in sequence.images] == forms


def test_images_are_upright_and_over_white_as_in_vllm(tmp_path):
    picture = Image.new("RGB", (30, 10), "blue")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    picture.save(tmp_path / "turned.png", exif=exif)
    assert load_image(str(tmp_path / "turned.png")).size == (10, 30)
    Image.new("RGBA", (4, 4), (0, 0, 255, 0)).save(tmp_path / "clear.png")
    assert load_image(str(tmp_path / "clear.png")).getpixel((0, 0)) == (255, 255, 255)
    Image.new("P", (4, 4), 0).save(tmp_path / "palette.png", transparency=0)
    assert load_image(str(tmp_path / "palette.png")).getpixel((0, 0)) == (255, 255, 255)


def test_images_that_cannot_be_read_leave_their_conversation_out_with_the_reason(llama4, pictures, tmp_path):
    reader = SequenceReader(llama4)
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(pictures[3]).read_bytes()[:300])
    (tmp_path / "text.png").write_text("no image")
    for address, reason in {
        str(tmp_path / "none.png"): r"image 2 \(/.*none.png\) cannot be read: FileNotFoundError: .*directory: it$",
        str(broken): r"image 2 \(/.*broken.png\) cannot be read: OSError",
        str(tmp_path / "text.png"): r"image 2 \(/.*text.png\) cannot be read: it is no image of",
        "http://127.0.0.1:9/1.png": r"cannot be read: its host 127\.0\.0\.1 is in this machine's network; set",
        "data:," + "x" * 500: r"image 2 \(data:,x{194}\.\.\.\) cannot be read: it is no image [^x]*$",
    }.items():
        with pytest.raises(UnreadableImagesError, match=reason):
            reader.read(conversation(asked(pictures[0], address), "So."))
    with pytest.raises(UnreadableImagesError, match=r"it has 6 images, more than dump\.max_images=5"):
        reader.read(conversation(asked(*pictures, pictures[0]), "So."))
    assert len(SequenceReader(llama4, max_images=6).read(conversation(asked(*pictures, pictures[0]), "So."))) == 1
    with pytest.raises(UnreadableImagesError, match="a content part of type input_audio"):
        reader.read(conversation([{"type": "input_audio", "input_audio": {}}], "So."))
    assert len(reader.read(conversation(asked(pictures[0]), "So."))) == 1


def test_a_verifier_of_words_alone_leaves_images_out_and_one_without_its_processor_says_so(
    verifier_config, llama4, pictures, tmp_path
):
    record = conversation(asked(pictures[0]), "So.")
    with pytest.raises(UnreadableImagesError, match="it has images, which the verifier does not take"):
        ImageReader(verifier_config).read(pictures[:1])
    bare = VerifierConfig(path=str(tmp_path), dtype=Dtype.float32, device=Device.cpu)
    for file in Path(llama4.path).iterdir():
        if file.name != "processor_config.json":
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(ValueError, match=r"verifier\.path .* reads images and has no processor for them .*: save") as e:
        SequenceReader(bare).read(record)
    assert not isinstance(e.value, NoExactSpanError)
    assert len(SequenceReader(bare).read(conversation("Hello.", "Hi."))) == 1


def test_an_image_that_was_exchanged_before_it_is_recorded_is_named(llama4, pictures, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(Path(pictures[0]).read_bytes())
    sample = sample_of(SequenceReader(llama4).read(conversation(asked(str(path)), "So."))[0], "s/7")
    engine = TransformersEngine(Verifier.load(llama4), 64, ImageReader(llama4))
    assert len(list(engine.read([sample]))) == 1
    path.write_bytes(Path(pictures[3]).read_bytes())
    with pytest.raises(ValueError, match="sample s/7: its images are not those that its tokens were made with; give"):
        list(engine.read([sample]))
    Image.new("RGB", Image.open(pictures[0]).size, "red").save(path)
    assert len(list(engine.read([sample]))) == 1, "the same tokens"
    sample.image_record = ImageRecord("conversations.jsonl", 0, ["0123456789abcdef"])
    with pytest.raises(ValueError, match="sample s/7: its images are not those that its tokens were made with; give"):
        list(engine.read([sample]))
    path.unlink()
    with pytest.raises(ValueError, match=r"sample s/7: image 1 \(.*a.png\) cannot be read: FileNotFoundError"):
        list(engine.read([sample]))


def test_preview_tells_an_image_by_its_number_and_tokens(llama4, pictures, tmp_path, capsys):
    record = {**conversation(asked(*pictures[:2]), "So."), "source": "s", "usage": {}}
    preview(conversations_run(tmp_path, llama4, record))
    lines = capsys.readouterr().out.splitlines()
    assert "<|start|>user<|message|>[image 1: 7 tokens][image 2: 17 tokens]What is it?<|end|>" in "".join(lines)
    assert lines[-1].startswith("online training leaves it out: it has images")


def test_a_dump_holds_the_states_of_samples_with_images_and_online_training_leaves_them_out(
    config, pictures, tmp_path, capsys
):
    records = [
        {**conversation(asked(*pictures[:2]), "Two.", asked(pictures[3], text="And?"), "Three."), "id": "s/seen"},
        {**conversation("Hello.", "Hi, you."), "id": "s/words"},
        {**conversation(asked(str(tmp_path / "gone.png")), "What?"), "id": "s/gone"},
    ]
    run = conversations_run(tmp_path, config, *({**record, "source": "s", "usage": {}} for record in records))
    run.train.hidden_states = HiddenStates.offline
    dump(run)
    said = capsys.readouterr().out
    assert "dump: s/gone is left out: image 1" in said
    store = HiddenStateStore(run.hidden_states_folder)
    assert dict(zip(store.ids, store.num_images, strict=True)) == {"s/seen": 3, "s/words": 0}
    assert store.manifest["counts"]["images"] == 1
    assert store.manifest["counts"]["samples_with_images"] == 1
    assert store.manifest["image_positions"] == "embedding of the placeholder token"
    sample = store[store.ids.index("s/seen")]
    inputs = by_the_processor(config, records[0], [*pictures[:2], pictures[3]])
    assert sample.input_ids.tolist() == inputs["input_ids"][0].tolist()
    model = Verifier.load(config).model
    floats = {name: value.float() for name, value in inputs.items() if value.is_floating_point()}
    with torch.no_grad():
        states = model(**{**inputs, **floats}, output_hidden_states=True, use_cache=False).hidden_states
    assert_states(config, inputs, states, (1, 3, 4), sample.aux_hidden_states, sample.last_hidden_state)
    Image.new("RGB", Image.open(pictures[0]).size, "red").save(tmp_path / "exchanged.png")
    other = {**conversation(asked(str(tmp_path / "exchanged.png")), "Red."), "source": "s", "usage": {}}
    again = conversations_run(tmp_path / "again", config, other)
    again.train.hidden_states = HiddenStates.online
    dump(again)
    (sample,) = [HiddenStateStore(again.hidden_states_folder, with_states=False)[0]]
    assert len(sample.image_record.digests) == 1
    split = Split.of([HiddenStateStore(run.hidden_states_folder, with_states=False)], 4096, TooLong.cut)
    assert (split.train, split.num_with_images) == ([[store.ids.index("s/words")]], 1)
    assert "1 left out as they have images, which online training does not read" in str(split)
