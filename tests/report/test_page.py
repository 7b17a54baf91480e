from __future__ import annotations

import json
import re
import shlex
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from folders import rewrite, status, write_status
from relfv.cli import build_parser, main
from relfv.commands.flags import settings_from
from relfv.errors import InputError
from relfv.report import page
from relfv.report.content import command_of
from relfv.report.page import page_path, write_report
from relfv.report.table import status_table
from relfv.settings import Settings
from relfv.stages.verdict import in_short
from relfv.store.locks import lock
from relfv.store.status import read_status
from relfv.store.statuses import natural_key


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, in a folder of results of its own."""
    shutil.copytree(finished, tmp_path / "out/pairs")
    return tmp_path / "out/pairs"


def summarise(folder: Path, **changes: Any) -> None:
    """Other numbers in A1's summary.json, as if relfv itself had written them."""

    def change(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    rewrite(folder / "A1/artifacts", "summary.json", change)


def row_of(folder: Path, q_id: str) -> str:
    """The text of a q_id's row in the table of the page."""
    table = write_report(folder).read_text().partition("<tbody>")[2].partition("</tbody>")[0]
    row = next(row for row in table.split("<tr>") if f">{q_id}</a>" in row)
    return " ".join(re.sub("<[^>]*>", " ", row).split())


SHARE = {"value": 0.5, "low": 0.2, "high": 0.8, "high_of_mean": 0.8, "n_queries": 11, "n_closing_half": 6}
HELD_OUT = {"held_out, layer_chosen_by_others": SHARE, "fv": SHARE}


def test_the_page_shows_every_q_id_and_its_links_lead_to_files(finished: Path) -> None:
    page = finished / "report/index.html"
    html = page.read_text()
    links = re.findall(r'(?:href|src)="([^"#]+)"', html)
    assert len(links) >= 8
    for link in links:
        assert (page.parent / link).resolve().is_file(), link
    assert "9 rows, fewer than the 10" in html
    # What differs from the spec is said at the foot of the page, and is no warning.
    assert "Other settings than the spec's: model is" in html.rpartition('<p class="soft">')[2]


def test_words_of_the_csv_are_text_on_the_page_and_never_markup(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "pairs"
    shutil.copytree(finished, copy)
    path = copy / "A1/artifacts/sampled_trials.json"
    path.chmod(0o644)
    word = re.search(r'"query": \{\s*"input": "([^"]+)"', path.read_text()).group(1)  # type: ignore[union-attr]
    path.write_text(path.read_text().replace(f'"input": "{word}"', '"input": "<script>alert(1)</script>"'))
    html = write_report(copy).read_text()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_the_page_is_one_file(finished: Path) -> None:
    html = page_path(finished).read_text()
    assert not re.findall(r'<link|<img|@import|url\(|src="(?!data:)|https?://', html)
    assert html.count("<svg") >= 2 * 3


def test_28_q_ids_of_a_model_of_32_x_32_heads_are_less_than_5_mb(copied: Path) -> None:
    before = len(write_report(copied).read_bytes())

    def enlarge(path: Path) -> None:
        header, row, *_ = path.read_text().splitlines()
        rest = row.split(",", 2)[2]
        cells = [f"{layer},{head},{rest}" for layer in range(32) for head in range(32)]
        path.write_text("\n".join([header, *cells, ""]))

    rewrite(copied / "A1/artifacts", "aie_scores.csv", enlarge)
    html = write_report(copied).read_text()
    assert html.count("<title>L") == 32 * 32 + 3 * 8
    heatmap, answers = (
        len(html.encode()) - before,
        2 * before,
    )  # of two q_ids, with half as many prompts as there may be
    assert 28 * (heatmap + answers / 2) < 5e6


def test_the_held_out_share_leads_with_its_interval(copied: Path) -> None:
    token = status_of_token(copied)
    summarise(copied, scored_token={**token, "tells_answers_apart": True}, share_of_gap=HELD_OUT)
    assert "50% (20% to 80%) 6 of 11" in row_of(copied, "A1")
    low = {**SHARE, "low": -0.1}
    summarise(copied, share_of_gap={**HELD_OUT, "held_out, layer_chosen_by_others": low})
    assert "50% (-10% to 80%) not shown to be above 0" in row_of(copied, "A1")


CHANGE = {"mean_delta_p": 0.25, "ci_low": 0.125, "ci_high": 0.375}


def test_what_the_model_can_do_and_what_it_answers_right_are_beside_all(copied: Path) -> None:
    ability = json.loads((copied / "A1/artifacts/summary.json").read_text())["ability"]
    assert "0% cannot do it commonest: " in row_of(copied, "A1")
    able = {**ability, "can_do": True, "clean_acc": {"value": 0.5, "low": 0.3, "high": 0.7}, "majority_acc": 0.125}
    step6 = {"all": {"n_eval": 12, **CHANGE}, "answered_right": {"n_eval": 5}}
    both = {"all": {**CHANGE, "mean_delta_p": 0.0625}, "answered_right": CHANGE}
    counts = {"n_trials": 12, "n_queries": 7, "min_queries": 6}
    summarise(copied, ability=able, answered_right={**counts, "top_heads": both, "heads": [], "step6": step6})
    assert "A1 " in row_of(copied, "A1")
    assert "50% commonest: 12%" in row_of(copied, "A1")
    section = write_report(copied).read_text().partition('<h2 id="A1">')[2].partition('<details class="qid">')[0]
    rows = [" ".join(re.sub("<[^>]*>", " ", row).split()) for row in section.split("<tr>")]
    assert "CIE of the top heads, mean +0.062 (+0.125 to +0.375) +0.250 (+0.125 to +0.375)" in rows
    assert any(re.match(r"change in P with the vector at layer \d \+0.250 .* too few", row) for row in rows)


def test_the_table_of_what_is_enough_says_what_was_not_measured(copied: Path) -> None:
    found = json.loads((copied / "A1/artifacts/summary.json").read_text())
    carriers = {**found["carriers"], "heads_in_place": {"share_of_gap": SHARE}}
    summarise(copied, share_of_gap=HELD_OUT, carriers=carriers)
    html = write_report(copied).read_text()
    text = " ".join(re.sub("<[^>]*>", " ", html).split())
    assert "heads put in place sufficient 50% (20% to 80%)" in text
    assert "heads or the vector's direction taken away necessary not measured (--extras ablation)" in text


def status_of_token(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "A1/artifacts/summary.json").read_text())["scored_token"]


def test_where_scored_tokens_do_not_tell_answers_apart_no_share_is_shown_and_the_page_says_why(copied: Path) -> None:
    token = {**status_of_token(copied), "tells_answers_apart": False}
    summarise(copied, scored_token=token, share_of_gap=HELD_OUT, whole_answers={"base": 0.0, "with": 0.25})
    row = row_of(copied, "A1")
    assert "tokens shared" in row
    assert "(20% to 80%)" not in row
    assert '<dt id="tokens-shared">' in page_path(copied).read_text()
    said = status_table(copied)
    assert re.search(r"A1 +completed .* 0\.00 -> 0\.25\*", said)
    assert "* whole answers right" in said


def test_the_command_on_the_page_repeats_the_settings(copied: Path) -> None:
    changes = {"alpha": -2.5, "allow_query_duplicates": True, "k_sweep": (1, 5), "corruption": "other", "model": "a b"}
    found = read_status(copied / "A1/artifacts")
    assert found is not None
    found.settings = Settings(**changes)
    program, *arguments = shlex.split(command_of(found))
    args = build_parser().parse_args(arguments)
    assert program == "relfv"
    assert args.q_list == "A1"
    assert settings_from(args).to_json() == {**found.settings.to_json(), "model_spec": "auto"}


def test_several_relations_get_a_page_each_and_an_index(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = copied.parent
    other = root / "others"
    shutil.copytree(copied, other)
    for q_id in ("A1", "B2", "C3"):
        document = status(other, q_id)
        write_status(other, q_id, {**document, "config": {**document["config"], "model": "demo"}})
    assert main(["report", "--out_root", str(root)]) == 0
    assert capsys.readouterr().out == f"{page_path(root)}\n"
    index = page_path(root).read_text()
    assert re.findall(r'href="(\.\./[^"]+)"', index) == ["../others/report/index.html", "../pairs/report/index.html"]
    assert ("embedded demo model" in page_path(other).read_text(), "demo" in index) == (True, True)
    assert "embedded demo model" not in page_path(copied).read_text()
    write_status(other, "C3", {**status(other, "C3"), "status": "failed"})
    write_report(other)
    assert "1 failed" in page_path(root).read_text()  # the index is never behind its pages
    page_path(root).write_text("edited")
    main(["verify", str(root)])
    assert "out/report/index.html  damaged: report/index.html" in capsys.readouterr().out


def test_each_model_of_a_folder_is_named_with_its_q_ids(copied: Path) -> None:
    document = status(copied, "A1")
    write_status(copied, "A1", {**document, "config": {**document["config"], "model": "demo"}})
    header = " ".join(write_report(copied).read_text().partition("</header>")[0].split())
    assert re.search(r"<strong>demo</strong> [^:]*: A1\.</p>", header)
    assert "B2, C3.</p>" in header


def test_a_q_id_is_given_for_its_relation(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = page_path(copied).read_bytes()
    page_path(copied).unlink()
    monkeypatch.chdir(copied / "A1")
    assert main(["report", "."]) == 0
    assert page_path(copied).read_bytes() == before
    assert not page_path(copied / "A1").exists()


def test_a_file_of_somebody_elses_is_no_index(copied: Path) -> None:
    foreign = page_path(copied.parent)
    foreign.parent.mkdir()
    foreign.write_text("mine")
    write_report(copied)
    assert foreign.read_text() == "mine"


def test_status_is_a_table_of_all_q_ids(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(finished)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"A1 +completed +12 +\d of 3", said)
    assert re.search(r"C3 +skipped +9 ", said)
    assert "2 completed, 1 skipped" in said
    table, of_all = (re.sub(r"\S+ (min|h|d)\b", "", status_table(root)) for root in (finished, finished.parent))
    assert of_all == table


def test_status_fits_the_terminal_and_breaks_no_word(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = f"the disk refused {'/deep' * 40}/file.json and so this q_id stands where it stood before it was begun"
    write_status(copied, "C3", {**status(copied, "C3"), "status": "failed", "reason": reason})
    for columns in (80, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = status_table(copied).splitlines()
        assert max(map(len, lines)) <= columns
        said = " ".join(" ".join(lines).split())
        assert "and so this q_id stands where it stood before it was begun" in said
        assert re.search(r"the disk refused /deep\S*…\S*/file\.json", said) or (columns == 200 and reason[:150] in said)


def test_status_names_relation_and_model_and_is_to_be_had_as_json(
    copied: Path, llama_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_status(copied, "A1", {**status(copied, "A1"), "status": "running"})
    assert main(["status", str(copied), "--json"]) == 0
    rows = {row["q_id"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == ["A1", "B2", "C3"]
    assert {(row["relation"], row["model"]) for row in rows.values()} == {("pairs", str(llama_path))}
    summary = json.loads((copied / "B2/artifacts/summary.json").read_text())
    assert rows["B2"]["whole_answers"] == summary["whole_answers"]
    assert rows["B2"]["tells_answers_apart"] is summary["scored_token"]["tells_answers_apart"]
    assert rows["B2"]["cannot_do"] == f"the model cannot do it: {summary['ability']['why_not']}"
    assert "the model cannot do it: clean accuracy 0." in " ".join(status_table(copied).split())
    assert "its process is gone" in rows["A1"]["reason"]
    assert "9 rows" in rows["C3"]["reason"]
    assert rows["A1"]["n_steps_done"] == rows["A1"]["n_steps"]
    assert status_table(copied).splitlines()[1].startswith("pairs: ")


def test_a_folder_without_results_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no qid_status\.json"):
        status_table(tmp_path)
    with pytest.raises(InputError, match="no q_id here"):
        write_report(tmp_path)


def test_q_ids_sort_as_people_count() -> None:
    assert sorted(["Q10", "Q2", "Q1"], key=natural_key) == ["Q1", "Q2", "Q10"]


def test_the_verdict_in_short_stands_apart_and_before_the_whole_one(copied: Path) -> None:
    summary = json.loads((copied / "A1/artifacts/summary.json").read_text())
    html = unescape(write_report(copied).read_text())
    assert f'<p class="verdict">{in_short(summary)}</p>\n<p>{summary["verdict"]}</p>' in html


def test_the_table_says_where_a_share_is_not_shown_to_be_the_relations_own(copied: Path) -> None:
    summary = json.loads((copied / "A1/artifacts/summary.json").read_text())
    sure = {"value": 0.8, "low": 0.6, "high": 0.9, "high_of_mean": 0.9, "n_queries": 12, "n_closing_half": 12}
    shares = {**summary["share_of_gap"], **dict.fromkeys(HELD_OUT, sure)}
    rival = {"share_of_gap_above": sure, "n_draws": 19, "n_draws_as_good": 0}
    able = {"scored_token": {**summary["scored_token"], "tells_answers_apart": True}, "share_of_gap": shares}
    summarise(copied, **able, against_random={"random_heads": rival})
    assert "80% (60% to 90%) 12 of 12" in row_of(copied, "A1")
    summarise(copied, **able, against_random={"random_heads": {**rival, "n_draws_as_good": 2}})
    assert "80% (60% to 90%) not shown to be its own 12 of 12" in row_of(copied, "A1")


def test_a_row_heads_long_word_is_broken_since_it_stays_where_the_rest_scrolls(copied: Path) -> None:
    (rule,) = re.findall(r'^th\[scope="row"\] \{([^}]*overflow-wrap[^}]*)\}', write_report(copied).read_text(), re.M)
    assert {"max-width: 26rem", "overflow-wrap: anywhere"} <= {one.strip() for one in rule.split(";")}


def test_what_was_not_measured_has_no_rows_of_dashes(copied: Path) -> None:
    html = write_report(copied).read_text()
    assert "not measured (--extras ablation)" in html
    assert "heads put in place" in html
    assert "heads set to" not in html


def test_prompts_are_shown_token_by_token_as_they_were_fed(copied: Path) -> None:
    fed = json.loads((copied / "A1/artifacts/step6/answers.json").read_text())["first_trial_as_fed"]
    trial = json.loads((copied / "A1/artifacts/sampled_trials.json").read_text())["trials"][0]
    for kind, text in (("clean", "clean_prompt_str"), ("corrupted", "corrupted_prompt_str")):
        assert fed[kind][0] == "<bos>"
        assert "".join(fed[kind][1:]) == trial[text].rstrip(" ")
    assert fed["zero_shot"][-1] == ":"
    html = write_report(copied).read_text()
    assert html.count('<p class="tokens">') == 2 * 3
    assert "<code>&lt;bos&gt;</code><wbr><code>Q</code>" in html


def test_status_says_what_is_left_while_a_run_goes(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for q_id, state in (("B2", "running"),):
        document = status(copied, q_id)
        write_status(copied, q_id, {**document, "status": state, "stages": {}})
    assert "left" not in status_table(copied)  # nobody is at work
    with lock(copied / ".locks/B2.lock"):
        assert re.search(r"1 completed, 1 running, 1 skipped; about \d+ s left", status_table(copied))
    assert main(["status", str(copied), "--watch"]) == 0
    said = capsys.readouterr().out
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\n", said)
    assert said.count("1 completed, 1 running") == 1


def test_each_of_very_many_q_ids_has_a_page_of_its_own_which_is_made_anew_only_when_its_files_change(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "MOST_ON_ONE_PAGE", 1)
    index = write_report(copied).read_text()
    own = {q_id: copied / f"report/q_ids/{q_id}.html" for q_id in ("A1", "B2")}
    assert "prompt by prompt" not in index
    for q_id, path in own.items():
        assert f'href="q_ids/{q_id}.html#{q_id}"' in index
        html = path.read_text()
        assert "prompt by prompt" in html
        for link in re.findall(r'(?:href|src)="([^"#]+)"', html.partition("<main")[2]):
            assert link.startswith("q_ids/") or (copied / "report" / link).resolve().is_file(), (
                link
            )  # <base> is report/
    before = {path: path.stat().st_mtime_ns for path in own.values()}
    summarise(copied, verdict="All is well. Or not.")
    assert write_report(copied).read_text().count("<tr>") == index.count("<tr>")
    assert "All is well." in own["A1"].read_text()
    assert own["B2"].stat().st_mtime_ns == before[own["B2"]]
    own["B2"].write_text(own["B2"].read_text().replace("B2", "B3"))
    write_report(copied)
    assert "B3" not in own["B2"].read_text()
