"""vLLM as the judge of images: it must read what fledge reads. Run by `make test-serving`."""

import json

import pytest
import torch
from fledge.data_synthesis.states.transformers_engine import TransformersEngine
from fledge.data_synthesis.store.shard import Sample
from fledge.data_synthesis.tokens.image_tokens import ImageReader
from fledge.data_synthesis.tokens.sequences import SequenceReader
from fledge.models.verifier.model import Verifier
from image_verifiers import asked, conversation, data_url, make_pictures, save_llama4
from PIL import Image
from serving import in_vllms_environment

pytestmark = pytest.mark.serving


def test_vllm_reads_images_as_the_same_tokens_and_pixels(tmp_path, tiny_verifier_folder):
    config = save_llama4(tmp_path / "verifier", tiny_verifier_folder, chunk=128)  # vLLM wants whole blocks
    paths = make_pictures(tmp_path)[:4]
    clear, turned = Image.open(paths[1]).convert("RGBA"), Image.Exif()
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    clear.save(paths[1])
    turned[0x0112] = 6
    Image.open(paths[2]).save(paths[2], exif=turned)
    record = conversation(asked(*map(data_url, paths)), "")
    request = {"verifier": config.path, "messages": record["messages"][:1], "max_tokens": 12}
    (tmp_path / "request.json").write_text(json.dumps(request))
    told, log = in_vllms_environment("vllm_chat.py", tmp_path / "request.json")
    assert told is not None, log[-6000:]

    reader, (start, end) = SequenceReader(config), (len(told["prompt"]), len(told["prompt"]) + len(told["answer"]))
    record["messages"][1]["content"] = told["text"]
    span = {"token_ids": told["prompt"] + told["answer"], "answers": [[start, end]]}
    (sequence,) = reader.read({**record, "sequences": [span]})
    assert sequence.token_ids == span["token_ids"]  # as recorded: what vLLM tells is expanded
    assert len(sequence.images) == 4
    (templated,) = reader.read(conversation(record["messages"][0]["content"], "So."))
    assert templated.token_ids[:start] == told["prompt"]

    verifier = Verifier.load(config)
    tokens, addresses = torch.tensor(sequence.token_ids), tuple(image.address for image in sequence.images)
    sample = Sample("s/1", tokens, torch.zeros(len(tokens)), images=addresses)
    ((_, _, last),) = TransformersEngine(verifier, 64, ImageReader(config)).read([sample])
    logits = last @ verifier.model.get_output_embeddings().weight.T
    assert logits[start - 1 : end - 1].argmax(-1).tolist() == told["answer"]
    blind = verifier.forward(tokens[None], use_cache=False).logits[0]
    assert blind[start - 1 : end - 1].argmax(-1).tolist() != told["answer"]
