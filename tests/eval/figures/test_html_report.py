"""report.html: the tokens that the journal holds, each as it came about, and nothing that a text could smuggle in."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from builders import save_byte_tokenizer
from evaluations import evaluation, question_record
from fledge.conf.runtime.journal import read_journal
from fledge.conf.schema import EvaluateEngine
from fledge.data_synthesis.show import token_texts
from fledge.eval.figures.report import write_report
from transformers import AutoTokenizer

KINDS = {"em": "first", "i": "draft", "u": "refused", "s": "bonus"}
HOSTILE = '</script><script>document.title="taken"</script><img src=http://h/x onerror=alert(1)>"\'&\x1b[31m\u202e'


class Page(HTMLParser):
    """What a page holds: its elements, and the tokens of its answers by question and by how they came about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: dict[str, list[tuple[str, str]]] = {}
        self.text = ""
        self._question, self._kind = "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "details":
            self._question = str(dict(attrs)["id"])
        self._kind = KINDS.get(tag, "") if self._question else ""

    def handle_endtag(self, tag):
        self._kind = ""
        self._question = "" if tag == "details" else self._question

    def handle_data(self, data):
        self.text += data
        if self._kind:
            self.tokens.setdefault(self._question, []).append((self._kind, data))

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def written(run: Path) -> Page:
    write_report(run / "evaluation", run / "training")
    return Page((run / "evaluation" / "report.html").read_text(encoding="utf-8"))


def of_head(record: dict) -> list[dict]:
    return [answer["drafters"]["trained head"] for answer in record["answers"]]


def with_texts(record: dict, *texts: list[str]) -> dict:
    """Give the answers of a record the texts of their tokens."""
    for answer, own in zip(record["answers"], texts, strict=True):
        answer["drafters"]["trained head"]["token_texts"] = own
    return record


def test_every_token_of_a_run_is_shown_as_it_came_about(finished):
    folder = finished.path / "evaluation"
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    results = json.loads((folder / "acceptance.json").read_text())
    records = [record for record in read_journal(folder / "questions.jsonl") if record["category"] != "heldout"]
    for number, record in enumerate(records):
        texts = [text for answer in record["answers"] for text in answer["drafters"]["trained head"]["token_texts"]]
        shown = [text.replace("\u21b5\n", "\n") for _, text in page.tokens[f"q{number}"]]
        assert shown == [text or "\u25ab" for text in texts]
    kinds = [kind for tokens in page.tokens.values() for kind, _ in tokens]
    assert len(kinds) == results["num_output_tokens"]
    assert kinds.count("first") == sum(len(record["answers"]) for record in records)
    assert 0 < kinds.count("draft") <= results["num_accepted_tokens"], "those after the end of an answer are not in it"
    assert kinds.count("refused") > 0
    assert kinds.count("bonus") > 0
    known = [drafter["refused_texts"] for record in records for drafter in of_head(record)]
    accepted = [drafter["accepted"] for record in records for drafter in of_head(record)]
    assert [[text is None for text in texts] for texts in known] == [[n == 3 for n in counts] for counts in accepted]
    assert all("data-r" in attributes for attributes in page.named("u"))
    assert [option["value"] for option in page.named("option")][1:9] == list(results["by_category"])


def test_a_round_is_its_drafts_and_what_the_verifier_chose_up_to_the_answers_end(tmp_path):
    record = with_texts(question_record([2, 3, 0, 1]), ["A", "b", "c", "D", "e", "f", "g", "H", "\n", "j"])
    evaluation(tmp_path / "run", [record])
    page = written(tmp_path / "run")
    drafts = [("draft", "e"), ("draft", "f"), ("draft", "g"), ("bonus", "H")]
    last = [("refused", "\u21b5\n"), ("draft", "j")]
    assert page.tokens["q0"] == [
        ("first", "A"), ("draft", "b"), ("draft", "c"), ("refused", "D"), *drafts, *last
    ]  # fmt: skip


def test_the_draft_that_was_refused_stands_at_the_verifiers_token(tmp_path):
    record = with_texts(question_record([1, 3]), [*"AbCdefG"])
    of_head(record)[0]["refused_texts"] = [' "x"\n', None]
    evaluation(tmp_path / "run", [record])
    page = written(tmp_path / "run")
    assert page.named("u") == [{"data-r": ' "x"\u21b5'}] * 2, "in the list of the worst rounds and in the answer"
    assert [attributes["id"] for attributes in page.named("button")].count("drafts") == 1


def test_the_bonus_token_of_a_tree_follows_its_deepest_node(tmp_path):
    texts = [*"abcdefgh"]
    record = with_texts(question_record([1, 4], drafted=60), texts)
    evaluation(tmp_path / "run", [record], num_draft_tokens=60, tree_depth=4)
    kinds = [kind for kind, _ in written(tmp_path / "run").tokens["q0"]]
    assert kinds == ["first", "draft", "refused", *["draft"] * 4, "bonus"]


def test_worst_rounds_come_first_and_those_of_one_kind_in_a_row_together(tmp_path):
    few = with_texts(question_record([1, 0, 3], name="q/1"), [*"abcdefgh"])
    many = with_texts(question_record([0, 0, 2, 0], name="q/2", category="stem"), [*"abcdefgh"])
    evaluation(tmp_path / "run", [few, many])
    text = written(tmp_path / "run").text
    found = re.findall(r"(\d+) rounds?, (\d) accepted(?: in each)? · (\w+)", text)
    assert found == [
        ("2", "0", "stem"), ("1", "0", "math"), ("1", "0", "stem"), ("1", "1", "math"), ("1", "2", "stem"),
        ("1", "3", "math"),
    ]  # fmt: skip


def test_nothing_that_a_model_or_a_user_wrote_becomes_markup_and_nothing_is_loaded(tmp_path):
    harmless, hostile = (
        with_texts(question_record([1], [0], name=text, category=text), [text] * 3, [text] * 2)
        for text in ("x", HOSTILE)
    )
    for record in (harmless, hostile):
        for drafter in of_head(record):
            drafter["refused_texts"] = [record["id"]]
        record["turns"] = [record["id"], [{"type": "text", "text": record["id"]}]]
        evaluation(tmp_path / str(record is hostile), [record, {**record, "left_out": record["id"], "id": "q/2"}])
    plain, page = written(tmp_path / "False"), written(tmp_path / "True")
    tags = [
        [tag for tag, _ in found.elements if tag not in ("tspan", "text", "path", "g", "use")]
        for found in (plain, page)
    ]
    assert tags[0] == tags[1]
    assert [token for _, token in page.tokens["q0"]] == [HOSTILE.replace("\x1b", "\\x1b")] * 5
    addresses = [
        value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href")
    ]
    assert addresses
    assert all(str(address).startswith("#") for address in addresses)
    policy = next(meta for meta in page.named("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert str(policy["content"]).startswith("default-src 'none'; ")


def test_answers_whose_tokens_are_not_known_are_plain(tmp_path):
    evaluation(tmp_path / "older", [question_record([2, 1]), with_texts(question_record([0], name="q/2"), ["a", "b"])])
    older = written(tmp_path / "older")
    assert list(older.tokens) == ["q1"]
    assert "1 of 2 answers are plain: they were decoded before" in older.text
    by_server = {"engine": EvaluateEngine.server, "endpoint": "http://h/v1"}
    evaluation(tmp_path / "served", [question_record([2, 1], server=True)], **by_server)
    served = written(tmp_path / "served")
    assert served.tokens == {}
    assert "acceptance length 2.50" in served.text


@pytest.mark.parametrize("text", ["na\u00efve \u6f22\u5b57 \U0001f642!\n", "", "\ufffd at an end \ufffd"])
def test_texts_of_tokens_add_up_to_the_text_whatever_bytes_they_share(tmp_path, text):
    save_byte_tokenizer(tmp_path, "")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    texts = token_texts(tokenizer, [*tokens, tokenizer.eos_token_id])
    assert len(texts) == len(tokens) + 1 == len(text.encode()) + 1
    assert "".join(texts) == f"{text}<end>"
    assert token_texts(tokenizer, tokenizer.encode("\u6f22", add_special_tokens=False)[:2]) == ["", "\ufffd"]


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_browser_filters_and_sorts(tmp_path):
    records = [
        with_texts(question_record([i % 4], name=f"q/{i}", category=f"c{i % 2}"), [*"abcdef"[: i % 4 + 2]])
        for i in range(4)
    ]
    evaluation(tmp_path / "run", records)
    written(tmp_path / "run")
    page = tmp_path / "run" / "evaluation" / "report.html"
    use = """<script>
    one("category").value = "c1"; one("category").onchange(); one("order").value = "number";
    one("order").onchange({target: one("order")}); document.querySelector("#q3 b").click();
    const seen = every("details, .stretch").filter(e => !e.hidden).map(e => e.id || e.dataset.category);
    document.title = JSON.stringify([seen, one("said").textContent]);
    </script>"""
    (tmp_path / "used.html").write_text(page.read_text() + use)
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--dump-dom", (tmp_path / "used.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    seen, said = json.loads(re.search(r"<title>(.*?)</title>", dom)[1])
    assert seen == ["c1", "c1", "q1", "q3"]
    assert said == "3 drafts accepted, all; then the bonus token"
