"""Which options a source `self` takes, and which others take: told before anything is drawn."""

from dataclasses import replace

import pytest
from fledge.conf.schema import Config, DataConfig, SourceConfig, validate

OWN, FILE_SOURCE = SourceConfig(path="self", limit=3), SourceConfig(path="a.jsonl")


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([replace(OWN, limit=None)], r"data.sources\[0\].limit is required with path=self"),
        ([replace(OWN, name="a/b")], r"data.sources\[0\].name must be a plain folder name"),
        ([replace(OWN, temperature=0.0)], r"data.sources\[0\].temperature must be above 0"),
        ([replace(OWN, streaming=True)], r"\[0\].streaming must be left out with path=self, got True: the verifier"),
        ([replace(OWN, revision="v1")], r"\[0\].revision must be left out with path=self, got v1"),
        ([replace(OWN, subset="en")], r"\[0\].subset must be left out with path=self, got en"),
        ([replace(OWN, split="test")], r"\[0\].split must be left out with path=self, got test"),
        ([OWN, replace(OWN, name="self")], r"\[1\].name must differ from that of another source self, got self"),
        *(
            ([OWN, replace(FILE_SOURCE, **{name: value})], rf"\[1\].{name} must be left out .* of path=self alone")
            for name, value in {"turns": 2, "temperature": 0.5, "top_p": 0.9, "max_tokens": 9, "min_ascii": 0.9}.items()
        ),
    ],
)
def test_options_of_self_prompts_are_checked(sources, message):
    with pytest.raises(ValueError, match=message):
        validate(Config(name="x", data=DataConfig(sources=sources)))


def test_a_prompt_of_one_turn_must_be_enough():
    least_two = DataConfig(sources=[OWN, FILE_SOURCE], min_turns=2)
    with pytest.raises(ValueError, match=r"^data.min_turns must be at most 1 with path=self, .* one turn, got 2"):
        validate(Config(name="x", data=least_two))
    validate(Config(name="x", data=replace(least_two, min_turns=1)))
    validate(Config(name="x", data=replace(least_two, sources=[FILE_SOURCE])))
