"""Heads from the hub and exports to it: real commands against a double of its HTTP interface (hub_double.py)."""

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants as hub_constants
import pytest
import torch
from builders import make_head
from fledge.conf.schema import Config, ExportFormat, validate
from fledge.models.export import export
from fledge.models.formats.model_card import license_of
from fledge.models.formats.plain import load_head, save_head
from fledge.models.import_head import import_head
from fledge.models.verifier.weights import verifier_identity
from hub_double import hub_double
from huggingface_hub import ModelCard
from published_heads import assert_same_head, published

NAME = "some-org/some-head"


def fledge(environment: dict[str, str], command: str, config: Config, *options: str) -> str:
    """Run a command of its own process, which reads the hub's address when it starts; return what it prints."""
    common = [f"runs_dir={config.runs_dir}", "name=run", f"verifier.path={config.verifier.path}"]
    common += ["verifier.dtype=float32", "verifier.device=cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "fledge", command, *common, *options],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def head(tmp_path, config) -> Path:
    folder = tmp_path / "head"
    folder.mkdir()
    save_head(folder, make_head(), {"verifier": verifier_identity(config.verifier), "step": 0}, torch.bfloat16)
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The double, which this process's client asks, too."""
    with hub_double() as double:
        default = hub_constants.ENDPOINT
        monkeypatch.setattr(hub_constants, "ENDPOINT", double.endpoint)
        resolve = hub_constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(default, double.endpoint)
        monkeypatch.setattr(hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", resolve)
        monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", double.environment("")["HF_TOKEN"])
        yield double


def test_an_export_goes_to_the_hub_and_comes_back_without_network(tmp_path, config, head, hub, monkeypatch):
    environment = hub.environment(tmp_path / "home", HF_HUB_CACHE=str(tmp_path / "cache"))
    options = [f"export.checkpoint={head}", f"export.push_to={NAME}", "export.base_model=some-org/verifier"]
    assert f"uploaded to {hub.endpoint}/{NAME}" in fledge(environment, "export", config, *options)
    files = hub.repositories[NAME]
    written = {"README.md", "SERVING.md", "config.json", "fledge.json", "model.safetensors", "trtllm.yaml"}
    assert set(files) == written
    assert hub.through_lfs == {"model.safetensors"}
    assert not any(str(tmp_path).encode() in data for data in files.values())
    config.head_import.source, online = NAME, config.runs_dir
    import_head(config)
    hub.shutdown()
    config.runs_dir = str(tmp_path / "offline")
    fledge({**environment, "HF_HUB_OFFLINE": "1"}, "import", config, f"head_import.source={NAME}")
    for runs in (online, config.runs_dir):
        read, record = load_head(Path(runs) / "run" / "imports" / "some-head")
        assert_same_head(read, make_head(), torch.bfloat16)
        assert record["imported_from"] == NAME


def test_what_the_hub_has_is_not_sent_again(config, head, hub):
    config.export.checkpoint, config.export.push_to = str(head), NAME
    config.export.base_model = "some-org/verifier"
    export(config)
    export(config)
    commits = [request for request in hub.requests if request.endswith("/commit/main")]
    assert len(commits) == 1
    config.evaluate.num_draft_tokens = 5
    export(config)
    assert b"max_draft_len: 5" in hub.repositories[NAME]["trtllm.yaml"]


def test_what_is_uploaded_names_the_hub(config, head, hub):
    config.export.checkpoint, config.export.push_to, config.export.private = str(head), NAME, True
    config.export.base_model = "some-org/verifier"
    export(config)
    files = {name: data.decode() for name, data in hub.repositories[NAME].items() if name != "model.safetensors"}
    assert hub.private[NAME]
    for words in (
        'vllm serve some-org/verifier --speculative-config \'{"method": "eagle3", "model": "some-org/some-head"',
        "--speculative-draft-model-path some-org/some-head",
        "hf download some-org/some-head trtllm.yaml --local-dir .\ntrtllm-serve some-org/verifier "
        "--extra_llm_api_options trtllm.yaml",
    ):
        assert words in files["SERVING.md"]
    assert 'speculative_model: "some-org/some-head"' in files["trtllm.yaml"]
    data = ModelCard(files["README.md"]).data
    assert (data.base_model, data.pipeline_tag) == ("some-org/verifier", "text-generation")
    assert (data.license, data.license_link) == ("other", "https://huggingface.co/some-org/verifier")


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("license: apache-2.0", {"license": "apache-2.0"}),
        (
            "license: other\nlicense_name: llama4\nlicense_link: LICENSE",
            {
                "license": "other",
                "license_name": "llama4",
                "license_link": "https://huggingface.co/some-org/verifier/blob/main/LICENSE",
            },
        ),
        (
            "license: other\nlicense_name: x\nlicense_link: https://host/x",
            {"license": "other", "license_name": "x", "license_link": "https://host/x"},
        ),
    ],
)
def test_the_licence_of_a_card_is_the_verifiers(tmp_path, front, expected):
    card = tmp_path / "README.md"
    card.write_text(f"---\n{front}\n---\n# A verifier\n")
    assert license_of(card, "some-org/verifier") == expected
    card.write_text("# A folder's own notes\n")
    assert (
        license_of(card, None)
        == license_of(None, None)
        == {"license": "other", "license_name": "the-verifiers-licence"}
    )


def test_a_refused_upload_keeps_the_export_and_says_how_to_log_in(config, head, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    config.export.checkpoint, config.export.push_to = str(head), NAME
    config.export.base_model = "some-org/verifier"
    with pytest.raises(ValueError, match=r"export\.push_to 'some-org/some-head' cannot be written \(.*401.*HF_TOKEN"):
        export(config)
    assert (config.run_folder / "exports" / "plain" / "model.safetensors").is_file()
    assert hub.repositories == {}


def test_an_upload_needs_one_format_and_the_verifiers_hub_id(config, head):
    config.export.checkpoint, config.export.push_to = str(head), NAME
    with pytest.raises(ValueError, match=r"export\.base_model is required with export\.push_to"):
        export(config)
    assert not (config.run_folder / "exports").exists()
    config.export.format = ExportFormat.all
    with pytest.raises(ValueError, match=r"export\.format must be plain or speculators with export\.push_to"):
        validate(config)
    config.export.push_to = "no-organisation"
    with pytest.raises(ValueError, match=r"export\.push_to must be a hub id, ORG/NAME"):
        validate(config)


def test_a_published_head_is_imported_by_its_hub_id(tmp_path, config, hub):
    theirs = published(tmp_path)
    files = {path.name: path.read_bytes() for path in theirs.folder.iterdir()}
    hub.repositories["their-org/eagle3"] = {**files, "training_state.pt": b"not fetched"}
    config.head_import.source = "their-org/eagle3"
    import_head(config)
    assert_same_head(
        load_head(config.run_folder / "imports" / "eagle3")[0],
        make_head(fc_norm=False, norm_output=False),
        torch.bfloat16,
    )
    assert not any("training_state" in request for request in hub.requests)


@pytest.mark.parametrize("source", ["their-org/absent", "/nowhere/at/all", "their-org/gone"])
def test_a_source_that_is_nowhere_is_refused_with_the_ways_to_get_it(config, hub, source):
    config.head_import.source = source
    if source.endswith("gone"):
        hub.shutdown()
        hub.server_close()
    with pytest.raises(
        ValueError, match=f"head_import.source '{source}' is neither a folder nor .*HF_TOKEN.*hf download"
    ):
        import_head(config)
