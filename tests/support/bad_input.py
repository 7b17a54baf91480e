"""What may be wrong with what relfv is given: the list behind docs/bad_input.md and test_bad_input.py."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from conftest import WORDS, make_tokenizer

HEADER = "id,ex_A,ex_B\n"
GOOD = HEADER + "".join(f"A1,{a},{b}\n" for a, b in WORDS)
RUN = ("run", "--relation_csv_path", "$CSV", "--model", "$MODEL", "--out_root", "$OUT", "--device", "cpu")


@dataclass(frozen=True)
class Row:
    """One thing that is wrong, and what relfv says to it."""

    wrong: str
    says: str
    """The whole line. $CSV, $MODEL and $OUT stand for what was given, … for what differs from case to case."""
    code: int = 2
    csv: str | bytes | Callable[[Path], object] | None = GOOD
    """Content of the CSV, or what makes it; None for no file."""
    model: Callable[[Path], object] | None = None
    """What is done to a copy of a good model's folder."""
    flags: Sequence[tuple[str, ...]] = ((),)
    """Cases: what each adds to a good command line."""
    command: tuple[str, ...] = RUN
    csv_name: str = "pairs.csv"


def q_id(text: str) -> str:
    """A CSV whose one relation is called ``text``."""
    return HEADER + "".join(f"{text},{a},{b}\n" for a, b in WORDS)


def word(text: str) -> str:
    """A CSV whose first word is ``text``."""
    return GOOD.replace("dog", text, 1)


def sparse(path: Path) -> None:
    """1 GiB that takes no room on disk."""
    with path.open("wb") as file:
        file.truncate(1 << 30)


_FOLDER_NAME = "expected 1 to 64 of A-Z a-z 0-9 . _ -, not starting with a dot or a hyphen"
_HEADER_SAYS = (
    "$CSV: line 1: header is …, which has … columns for the …; expected exactly one of … (any case), as in id,ex_A,ex_B"
)
_CONTROL = "$CSV: 1 problem(s): line 2: the input of A1 contains a line break or control character: …; take it out, or let relfv import do so"
_OUT_OF_REACH = "expected a Hugging Face model folder, a GGUF file, a model in the local cache or on the hub, or 'demo'"

CSV_ROWS = [
    Row("no such file", "$CSV: no such file; expected a relation CSV (see --relation_csv_path; paths count from the current folder)", csv=None),
    Row("a folder", "$CSV: cannot be read (Is a directory); expected a relation CSV", csv=Path.mkdir),
    Row("a pipe, a device", "$CSV: is not a regular file; expected a relation CSV, so save what comes from a pipe first", csv=os.mkfifo),
    Row("a path with a NUL in it", "…: cannot be read (…null…); expected a relation CSV", flags=[("--relation_csv_path", "a\0b")]),
    Row("empty", "$CSV: is empty; expected a header id,ex_A,ex_B and one pair a row", csv=""),
    Row("a header and nothing else", "$CSV: no word pairs; expected a header id,ex_A,ex_B and one pair a row", csv=HEADER),
    Row("no header", _HEADER_SAYS, csv="Q1,dog,puppy\nQ1,cat,kitten\n"),
    Row("Excel's mark of the separator", "$CSV: line 1: is Excel's mark of the separator (sep=…); take this line out", csv="sep=;\n" + GOOD.replace(",", ";")),
    Row("three columns of other names", "$CSV: line 1: header is …, which has 0 columns for the q_id; …; and 0 columns for the output; expected exactly one of … (any case), as in id,ex_A,ex_B", csv="relation,input,reply\nQ1,a,b\n"),
    Row("a column is missing", _HEADER_SAYS, csv="id,ex_A\nQ1,a\n"),
    Row("a column is there twice", _HEADER_SAYS, csv="id,ex_A,ex_B,input\nQ1,a,b,c\n"),
    Row("bars between columns", _HEADER_SAYS + "; columns are separated by commas, semicolons or tabs", csv=GOOD.replace(",", "|")),
    Row("a row with too few columns", "$CSV: 1 problem(s): line 2: 2 columns, expected 3 (quote words that contain the separator)", csv=HEADER + "Q1,a\n"),
    Row("a row with too many columns", "$CSV: 1 problem(s): line 3: 4 columns, expected 3 (quote words that contain the separator)", csv=HEADER + "Q1,a,b\nQ1,new delhi,x,y\n"),
    Row("a blank word", "$CSV: 1 problem(s): line 3: the input of Q1 is blank", csv=HEADER + "Q1,a,b\nQ1, ,b\n"),
    Row("a blank q_id", "$CSV: 1 problem(s): line 2: the q_id is blank", csv=HEADER + ",a,b\n"),
    Row("UTF-16", "$CSV: line 1: begins as a UTF-16 file does; expected UTF-8, so save the file as UTF-8", csv=GOOD.encode("utf-16")),
    Row("UTF-16 without its mark", "$CSV: line 1: contains a NUL byte; expected a text file, saved as UTF-8 (not UTF-16)", csv=GOOD.encode("utf-16-le")),
    Row("Latin-1", "$CSV: line 2: not UTF-8 (byte 17); save the file as UTF-8", csv=word("dög").encode("latin-1")),
    Row("a NUL byte", "$CSV: line 2: contains a NUL byte; expected a text file, saved as UTF-8 (not UTF-16)", csv=word("d\0g")),
    Row("a NUL byte in a file with old Mac line ends", "$CSV: line 3: contains a NUL byte; expected a text file, saved as UTF-8 (not UTF-16)", csv=GOOD.replace("kitten", "\0").replace("\n", "\r")),
    Row("a picture, a program, ...", "$CSV: line 1: not UTF-8 (byte 0); save the file as UTF-8", csv=b"\x89PNG\r\n\x1a\n" + bytes(range(256))),
    Row("1 GiB (sparse)", "$CSV: has 1073741824 bytes; expected a relation CSV of at most 67108864, so leave out relations, or split the file", csv=sparse),
    Row("a cell of 200,000 characters", "$CSV: 1 problem(s): line 2: not readable as CSV (field larger than field limit (131072); is a quote never closed?)", csv=HEADER + "Q1,a," + "b" * 200_000),
    Row("a quote that is never closed", "$CSV: 1 problem(s): line 3: not readable as CSV (unexpected end of data; is a quote never closed?)", csv=HEADER + 'Q1,a,b\nQ1,"c,d\nQ1,e,f\n'),
    Row("a line break in a word", _CONTROL, csv=word('"d\ng"')),
    Row("a line break of Unicode in a word (U+0085, U+2028)", _CONTROL, csv=word("d\u2028g")),
    Row("a control character in a word", _CONTROL, csv=word("d\x1b[31mg")),
    Row("the same q_id in two spellings", "$CSV: 1 problem(s): q_id 'q1' and 'Q1' differ only in case; use one spelling", csv=HEADER + "Q1,a,b\nq1,c,d\n"),
    *(
        Row(f"q_id: {what}", f"$CSV: 12 problem(s): line 2, …, 11: q_id {text[:80]!a} cannot be a folder name; {_FOLDER_NAME}; and 2 more", csv=q_id(text))
        for what, text in [
            ("a path", "../x"), ("an absolute path", "/etc/x"), ("the folder above", ".."), ("a hidden folder", ".git"),
            ("300 characters", "q" * 300), ("a control character", "Q\x1b[31m1"), ("letters of another script that look alike", "\u0410\u03011"),
            ("é in one character (NFC)", "Q\u00e9"), ("é in two characters (NFD)", "Qe\u0301"), ("an invisible character", "Q\u200b1"),
            ("an option to commands, a formula to spreadsheets", "-rf"), ("a formula", "=1+1"), ("a back slash", "a\\b"),
        ]
    ),
    *(
        Row(f"q_id: {what}", f"$CSV: 12 problem(s): line 2, …, 11: q_id {text!r} is a name that {who}; use another; and 2 more", csv=q_id(text))
        for what, text, who in [
            ("a device of Windows", "CON", "Windows keeps for itself"), ("one with an ending", "nul.txt", "Windows keeps for itself"),
            ("a dot at the end", "Q1.", "Windows keeps for itself"),
            ("the report's folder", "Report", "relfv gives to files beside the q_ids' folders"),
            ("a run-wide file", "run_manifest.json.damaged", "relfv gives to files beside the q_ids' folders"),
            ("another", "cross_fv.json", "relfv gives to files beside the q_ids' folders"),
            ("what --force calls a folder", "Q1.replaced-x", "relfv gives to files beside the q_ids' folders"),
        ]
    ),
    Row("a relation with two names", "$CSV: 2 problem(s): line 3, 4: A1 is named 'young' here and 'its young' further up; expected one name for all rows of a q_id, or none, so correct one of them", csv="id,ex_A,ex_B,name\nA1,dog,puppy,its young\nA1,cat,kitten,young\nA1,cow,calf,young\nA1,owl,owlet,\n"),
    Row("a name of several lines", "$CSV: 1 problem(s): line 2: the name of A1 is 'its\\nyoung'...; expected a few words on one line, at most 100 characters, none of them a control character", csv='id,ex_A,ex_B,name\nA1,dog,puppy,"its\nyoung"\n'),
    Row("two columns of names", "$CSV: line 1: 2 columns are called name; expected one, or none", csv="id,ex_A,ex_B,name,Name\nA1,dog,puppy,a,b\n"),
    Row("many bad rows", "$CSV: 13 problem(s): line 2, 3, 4, 5, 6, 7, 8, 9, 10, 11: 2 columns, expected 3 (quote words that contain the separator); and 3 more", csv=HEADER + "Q1,a\n" * 13),
    Row("a file name that gives no folder name", "$CSV: its results would go into a folder '..'; expected a file name that does not start with a dot and has no control characters, so rename the file", csv_name="...csv"),
    Row("a file name that steers a terminal", "…: its results would go into a folder 'a\\x1b[31mb'; expected a file name that does not start with a dot and has no control characters, so rename the file", csv_name="a\x1b[31mb.csv"),
]  # fmt: skip

_CLAIM = {"says": "It works.", "file": "summary.json", "value": ["acc", "fv"], "at_least": 0.5}


def _planned(wrong: str, says: str, **content: object) -> Row:
    """``--plan`` with a file of this content, or of a hypothesis with these keys changed."""
    document = (
        content if content.keys() & {"hypotheses", "exclusions", "layers"} else {"hypotheses": [{**_CLAIM, **content}]}
    )
    model = lambda folder: (folder / "plan.json").write_text(json.dumps(document))  # noqa: E731
    return Row(
        f"a plan: {wrong}", f"--plan $MODEL/plan.json: {says}", model=model, flags=[("--plan", "$MODEL/plan.json")]
    )


FLAG_ROWS = [
    Row("an unknown q_id", "--q_list: Z9 not in $CSV, which has A1; expected q_ids of the CSV", flags=[("--q_list", "A1,Z9")]),
    Row("a q_id in another case", "--q_list: a1 not in $CSV, which has A1; expected q_ids of the CSV", flags=[("--q_list", "a1")]),
    Row("an empty list of q_ids", "--q_list: is empty; expected q_ids separated by commas, or all", flags=[("--q_list", ","), ("--q_list", "")]),
    Row("a count that is no whole number", "relfv run: error: argument …: invalid int value: … (see relfv run --help)",
        flags=[(f"{flag}={value}",) for flag in ("--n_trials_per_q", "--n_demos", "--topk", "--n_eval", "--seed") for value in ("nan", "inf", "1.5", "1e3", "")]),
    Row("a count out of range", "…: expected a whole number of at least 1 and at most 100000",
        flags=[(f"{flag}={value}",) for flag in ("--n_trials_per_q", "--n_demos", "--topk", "--n_eval") for value in ("0", "-1", "100001", "9" * 30)]),
    Row("a seed out of range", "--seed …: expected a whole number of at least 0 and at most 9223372036854775807", flags=[("--seed=-1",), (f"--seed={2**63}",)]),
    Row("an alpha that is not finite, or larger than models can add", "--alpha …: expected a finite number between -1e+06 and 1e+06", flags=[(f"--alpha={value}",) for value in ("nan", "inf", "-inf", "1e999", "1e7")]),
    Row("an alpha that is no number", "relfv run: error: argument --alpha: invalid float value: … (see relfv run --help)", flags=[("--alpha=",), ("--alpha=much",)]),
    Row("more heads than the model has", "--topk 100: $MODEL has 24 heads to choose from; expected at most that", flags=[("--topk", "100")]),
    Row("a sweep that is no list of numbers", "relfv run: error: argument …: invalid value: …; expected numbers separated by commas, such as … (see relfv run --help)", flags=[(f"{flag}={value}",) for flag in ("--alpha_sweep", "--alpha_sweep_relative", "--k_sweep") for value in ("", "1,,2", "much")] + [("--k_sweep=1.5",)]),
    Row("a sweep over an alpha that is not finite, or too large", "--alpha_sweep …: expected a finite number between -1e+06 and 1e+06", flags=[(f"--alpha_sweep=1,{value}",) for value in ("nan", "inf", "1e7")]),
    Row("a sweep over a k out of range", "--k_sweep …: expected a whole number of at least 1 and at most 100000", flags=[(f"--k_sweep=1,{value}",) for value in ("0", "-1", "100001")]),
    Row("a sweep over more heads than the model has", "--k_sweep 25: $MODEL has 24 heads to choose from; expected at most that", flags=[("--k_sweep", "1,25")]),
    Row("an unknown device", "--device …: …expected auto, cpu, cuda, cuda:<n> or mps", flags=[("--device", name) for name in ("tpu", "CPU", "meta", "cuda:-1", "cpu:5")]),
    Row("a CUDA device that is not there", "--device 'cuda:99': this machine has … usable CUDA device(s); use --device cpu, or a PyTorch build and driver that see your GPU (python -c 'import torch; print(torch.cuda.is_available())')", flags=[("--device", "cuda:99")]),
    Row("one of several devices that is not there", "--devices …: …; use --device cpu, or a PyTorch build …", command=RUN[:-2], flags=[("--devices", "cpu,cuda:99")]),
    Row("processes a card, and Ray's", "--ray local and --per_card 2: use --gpus_per_worker 0.5 for that", flags=[("--ray", "local", "--per_card", "2")]),
    Row("a device, and several", "--device cpu and --devices cpu,cpu: expected one of the two", flags=[("--devices", "cpu,cpu")]),
    Row("an unknown dtype", "--dtype 'float8': expected one of auto, float32, bfloat16, float16, fp32, bf16, fp16", flags=[("--dtype", "float8")]),
    Row("an unknown quantisation", "--quant '3bit': expected one of none, 8bit, 4bit", flags=[("--quant", "3bit")]),
    Row("packed weights that are to stream", "--offload cpu: the weights of '$MODEL' are packed in few bits, and packed weights do not stream; use --offload none, or a model with weights of 16 or 32 bits", flags=[("--quant", "8bit", "--offload", "cpu")]),
    Row("a revision of a folder", "--revision 'step1000': '$MODEL' is a folder, and only models on the hub have revisions; leave it out, or name a hub id", flags=[("--revision", "step1000")]),
    Row("an unknown family", "--model_spec 'bert': expected one of auto, llama3, …", flags=[("--model_spec", "bert")]),
    Row("a family that is not the model's", "--model_spec 'gpt2' does not fit this checkpoint, whose config says model_type 'llama'; expected llama3 or llama: use --model_spec llama3, or auto", flags=[("--model_spec", "gpt2")]),
    Row("results into a file", "--out_root: $CSV is a file; expected a folder for the results, there or yet to be made", flags=[("--out_root", "$CSV"), ("--out_root", "$CSV/deeper")]),
    Row("an empty path, as an unset variable gives", "relfv …: error: argument …: is empty or has a NUL in it; expected a path (see relfv … --help)", flags=[("--out_root", ""), ("--out_root", "a\0b")]),
    Row("the same for one stage", "relfv heatmap: error: argument --in_dir: is empty or has a NUL in it; expected a path (see relfv heatmap --help)", command=("heatmap", "--in_dir", "")),
    Row("a name that is not UTF-8", "relfv run: error: argument --out_root: …: is not UTF-8; expected a name that is, so rename the file or folder (see relfv run --help)", flags=[("--out_root", "a\udcff")]),
    Row("the same for the model or the CSV", "--…: is not UTF-8; expected a name that is, so rename the file or folder", flags=[("--model", "a\udcff"), ("--relation_csv_path", "a\udcff")]),
    Row("a file name with a folder, or a NUL, in it", "--out_name …: expected a file name without a folder; it goes into --in_dir", command=("heatmap", "--in_dir", "$OUT"), flags=[("--out_name", "a\0b"), ("--out_name", "a/b")]),
    Row("a terminal's escape in a flag", "relfv run: error: unrecognized arguments: \\x1b[31m\\n\\u202e (see relfv run --help)", flags=[("\x1b[31m\n\u202e",)]),
    Row("a heatmap of no heads", "relfv heatmap: error: argument --topk: invalid value: …; expected a whole number from 1 to 100000 (see relfv heatmap --help)",
        command=("heatmap", "--in_dir", "$OUT"), flags=[(f"--topk={value}",) for value in ("0", "-1", "nan", "inf", "100001")]),
    Row("a plan that is not there", "--plan $OUT: cannot be read (No such file or directory); expected a JSON file", flags=[("--plan", "$OUT")]),
    Row("a plan that is no JSON", "--plan $CSV: is not JSON in UTF-8 (…); expected hypotheses, layer_rule, exclusions, notes, analyst", flags=[("--plan", "$CSV")]),
    _planned("a key that is not known", "layers is not known here; expected some of hypotheses, layer_rule, exclusions, notes, analyst", layers=3),
    _planned("a layer rule that is none", "layer_rule is 'first'; expected held_out, best, or the number of a layer", exclusions={}, layer_rule="first"),
    _planned("an exclusion of an unknown q_id", "exclusions: Z9 not in $CSV, which has A1; expected q_ids of the CSV", exclusions={"Z9": "odd"}),
    _planned("an exclusion without a reason", "exclusions is {'A1': ''}; expected an object: by q_id the reason, in words", exclusions={"A1": ""}),
    _planned("a q_id both claimed and excluded", "hypothesis 1: A1 is excluded by the same plan; expected one of the two", hypotheses=[{**_CLAIM, "q_ids": ["A1"]}], exclusions={"A1": "odd"}),
    _planned("a claim that cannot fail", "hypothesis 1: says nothing that could fail; expected one of at_least, at_most, equals", hypotheses=[{key: _CLAIM[key] for key in ("says", "file", "value")}]),
    _planned("a claim about a file that no q_id has", "hypothesis 1: file is 'cie_scores.csv'; expected one of …summary.json…aggregate.json…", file="cie_scores.csv"),
    _planned("a claim about a value that no such file has", "hypothesis 1: summary.json has no 'gap'; expected …, share_of_gap, …", value=["gap", "fv"]),
    _planned("a claim about more than a value", "hypothesis 1: value is ['acc']; expected a path that leads to a number, a text, true or false, not to more keys", value=["acc"]),
    _planned("a limit that is no number", "hypothesis 1: at_least is 'half'; expected a number", at_least="half"),
    _planned("a claim about a layer that is not there", "hypothesis 1: is about layer 3; expected one of the model's, 0 to 2", file="controls.json", value=["per_layer", 3, "fv", "acc"]),
    Row("StepD of several q_ids", "--relation_q_list 'A1,B2': expected one q_id a run; relfv run does them all",
        command=("stepd", "--relation_q_list", "A1,B2", "--out_base_dir", "$OUT")),
    Row("StepD of an unknown q_id", "--relation_q_list: Z9 not in $CSV, which has A1; expected q_ids of the CSV",
        command=("stepd", "--relation_csv_path", "$CSV", "--relation_q_list", "Z9", "--out_base_dir", "$OUT", "--model", "$MODEL")),
    Row("StepD of layers that are not there", "--layers …: …", command=("stepd", "--relation_csv_path", "$CSV", "--relation_q_list", "A1", "--out_base_dir", "$OUT", "--model", "$MODEL"),
        flags=[(f"--layers={value}",) for value in ("", "0-9", "-1", "0,,1", "nan", "9" * 5000)]),
    Row("status of a folder without results", "$OUT: no qid_status.json here or below; expected the folder that relfv run wrote to", command=("status", "$OUT")),
    Row("report of a folder without results", "$OUT: no q_id here; expected a relation's results folder, e.g. results_fv/relation_qwise/relationA_ex", command=("report", "$OUT")),
    Row("crossing a folder without results", "$OUT: no q_id here; expected a relation's results folder, e.g. results_fv/relation_qwise/relationA_ex", command=("cross", "$OUT")),
    Row("putting together a folder without results", "$OUT: no q_id here; expected a relation's results folder, e.g. results_fv/relation_qwise/relationA_ex", command=("aggregate", "$OUT")),
    Row("training with a log that cannot be written", "--log_path $OUT/there/log: cannot be written (No such file or directory); expected a file in a folder that is there",
        command=("demo-model", "train", "--out_dir", "$OUT", "--relation_csv_path", "$CSV", "--log_path", "$OUT/there/log")),
    Row("training with numbers that make no sense", "relfv demo-model: error: argument …: invalid value: …; expected a whole number from … to … (see relfv demo-model --help)",
        command=("demo-model", "train", "--out_dir", "$OUT"), flags=[("--steps=0",), ("--steps=inf",), ("--seed=-1",), ("--seed=nan",)]),
]  # fmt: skip


def _rewrite(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Change the tensors of a model's folder."""

    def do(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return do


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def _config(**changes: object) -> Callable[[Path], None]:
    """Change a model's config."""

    def do(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return do


def _adapter_of_a_number(folder: Path) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": 5}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _smaller_vocabulary(folder: Path) -> None:
    _config(vocab_size=300)(folder)
    _rewrite(lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:300].clone()}))(folder)


class Pickled:
    """Unpickling it makes the file OWNED in the model's folder: what a hostile checkpoint would do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return Path.write_text, (Path(self.folder, "OWNED"), "")  # type: ignore[return-value]


def pickled_weights(folder: Path) -> None:
    """Weights as a pickle that holds code."""
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Pickled(folder)}, folder / "pytorch_model.bin")


def remote_code(folder: Path) -> None:
    """A model that brings its own code, which makes the file OWNED where it is run."""
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": own}))
    (folder / "own.py").write_text(
        f"open({str(folder / 'OWNED')!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )


def _answer_that_vanishes(folder: Path) -> None:
    from tokenizers import normalizers

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" puppy", "")
    tokenizer.save_pretrained(folder)


O_PROJ = "model.layers.0.self_attn.o_proj.weight"

MODEL_ROWS = [
    Row("a path that is not there", "--model …: no such folder; expected a model folder, a hub id or 'demo'", flags=[("--model", name) for name in ("/nowhere", "./nowhere", "a/b/c", "no hub id!")]),
    Row("an empty one", "--model '': is empty; expected a model folder, a hub id or 'demo'", flags=[("--model", "")]),
    Row("a link that leads nowhere", "--model …: is a link to /nowhere/model, which is not there; expected a model folder, a hub id or 'demo'", model=lambda folder: (folder / "link").symlink_to("/nowhere/model"), flags=[("--model", "$MODEL/link")]),
    Row("a path that cannot be", "--model …: cannot be opened (…); expected a model folder, a hub id or 'demo'", flags=[("--model", "a\0b"), ("--model", "a" * 5000)]),
    Row("a file", "--model '$CSV': is a file; expected a Hugging Face model folder, a .gguf file or a hub id", flags=[("--model", "$CSV")]),
    Row("a hub id, and no network", "--model 'someone/nothing': no such folder or file is here, and relfv cannot open its config (HF_HUB_OFFLINE is set): …; " + _OUT_OF_REACH, flags=[("--model", "someone/nothing")]),
    Row("no config", "--model '$MODEL': the folder has no config.json; expected a Hugging Face model folder", model=lambda folder: (folder / "config.json").unlink()),
    Row("a user that is not known", "--model '~nosuchuser/x': cannot be opened (…); expected a model folder, a hub id or 'demo'", flags=[("--model", "~nosuchuser/x")]),
    Row("an adapter whose base model is a number", "$MODEL/adapter_config.json: names no base model; write the base model's folder into base_model_name_or_path", model=_adapter_of_a_number),
    Row("an encoder", "--model '$MODEL': is an encoder (bert), whose tokens see later ones; expected a decoder that predicts the next token (one of BERT's kin trained as such has is_decoder true in its config)", model=_config(model_type="bert")),
    Row("a config of 10,000 layers", "--model '$MODEL': its config asks for 10000 layers; expected at most 2000, so is the config.json damaged?", model=_config(num_hidden_layers=10_000)),
    Row("a config that asks for code from elsewhere (it is not fetched)", "--model '$MODEL': its config asks for attn_implementation 'someone/kernel', which is no part of transformers; expected one of eager, …: take it out of config.json, or allow code from elsewhere by --trust_remote_code", model=_config(attn_implementation="someone/kernel")),
    Row("weights packed in a format whose package is not there", "--model '$MODEL': its weights are packed (gptq), and what reads them is missing on cpu: …", model=_config(quantization_config={"quant_method": "gptq", "bits": 4})),
    Row("weights packed in a format that transformers does not know", "--model '$MODEL': its weights are packed (of-tomorrow), and what reads them is missing on cpu: …", model=_config(quantization_config={"quant_method": "of-tomorrow"})),
    Row("packed weights that are to be packed", "--quant …bit: the weights of '$MODEL' are packed already (gptq); use --quant none", model=_config(quantization_config={"quant_method": "gptq", "bits": 4}), flags=[("--quant", "8bit"), ("--quant", "4bit")]),
    Row("a GGUF file that is none", "--model '…none.gguf': cannot open its config: …; " + _OUT_OF_REACH, model=lambda folder: (folder / "none.gguf").write_bytes(b"GG"), flags=[("--model", "$MODEL/none.gguf")]),
    Row("a damaged config", "--model '$MODEL': cannot open its config: …; " + _OUT_OF_REACH, model=lambda folder: (folder / "config.json").write_text("{")),
    Row("a config without weights", "--model '$MODEL': cannot open its model: …; " + _OUT_OF_REACH, model=lambda folder: (folder / "model.safetensors").unlink()),
    Row("weights cut short", "--model '$MODEL': cannot open its model: model.safetensors: …; expected weights that are whole, so fetch or copy that file again", model=_cut),
    Row("empty weights", "--model '$MODEL': cannot open its model: model.safetensors: …; expected weights that are whole, so fetch or copy that file again", model=lambda folder: (folder / "model.safetensors").write_bytes(b"")),
    Row("weights that lack a tensor (transformers would make up a random one)", f"--model '$MODEL': 1 tensor(s) missing from its weights, such as '{O_PROJ}'; expected weights that are whole and made for this config, so fetch or copy the model again", model=_rewrite(lambda t: t.pop(O_PROJ))),
    Row("a tensor of another shape", f"--model '$MODEL': 1 tensor(s) of another shape than its config says, such as '{O_PROJ}'; expected weights that are whole and made for this config, so fetch or copy the model again", model=_rewrite(lambda t: t.update({O_PROJ: torch.zeros(3, 3)}))),
    Row("NaN among the weights", "LlamaForCausalLM gives NaN or infinite logits on a plain prompt, also in float32; expected finite numbers, so its weights are damaged: fetch or copy the model again", 1, model=_rewrite(lambda t: t[O_PROJ].fill_(float("nan")))),
    Row("weights as a pickle with code in it (it is not run)", "--model '$MODEL': its weights are a damaged pickle, or one that holds more than tensors, and no code in weights is ever run; expected safetensors, or a .bin file of tensors", model=pickled_weights),
    Row("a model with code of its own (it is not run)", "--model '$MODEL': cannot open its config: …custom code…; " + _OUT_OF_REACH, model=remote_code, flags=[(), ("--no-trust_remote_code",)]),
    Row("no tokenizer", "--model '$MODEL': cannot open its tokenizer: …; " + _OUT_OF_REACH, model=lambda folder: (folder / "tokenizer.json").unlink()),
    Row("a damaged tokenizer", "--model '$MODEL': cannot open its tokenizer: …; " + _OUT_OF_REACH, model=lambda folder: (folder / "tokenizer.json").write_text("{")),
    Row("another model's tokenizer, with more tokens", "the tokenizer gives … the token id …, and the model has only 300 embeddings; expected the tokenizer that the model was made with", model=_smaller_vocabulary),
]  # fmt: skip

FAILED_ROWS = [
    Row("a word that holds a special token", "A1 failed: the word '<bos>' contains '<bos>', a special token of this tokenizer", 1, csv=word("<bos>")),
    Row("an answer that gives no token", "A1 failed: the answer 'puppy' gives no token after …", 1, model=_answer_that_vanishes),
]  # fmt: skip

PAIRS = {"A1": [("dog", "puppy"), ("cat", "kitten")]}
ACCEPTED: list[tuple[str, str | bytes, dict[str, list[tuple[str, str]]]]] = [
    ("a byte order mark", b"\xef\xbb\xbf" + HEADER.encode() + b"A1,dog,puppy\nA1,cat,kitten\n", PAIRS),
    ("line ends of Windows, or of old Macs", HEADER.replace("\n", "\r\n") + "A1,dog,puppy\rA1,cat,kitten", PAIRS),
    ("semicolons between columns, as spreadsheets write where commas stand in numbers", "id;ex_A;ex_B\nA1;dog;puppy, young\nA1;cat;kitten\n", {"A1": [("dog", "puppy, young"), ("cat", "kitten")]}),
    ("tabs between columns", HEADER.replace(",", "\t") + "A1\tdog\tpuppy\nA1\tcat\tkitten\n", PAIRS),
    ("spaces, also line breaks, around a cell: they are no part of it", 'id, ex_A ,ex_B\n A1 ," dog\n",puppy\nA1,\u00a0cat,kitten  \n', PAIRS),
    ("blank lines, and rows of nothing but commas", HEADER + "\nA1,dog,puppy\n,,\n\nA1,cat,kitten\n\n", PAIRS),
    ("other columns", "comment,id,ex_A,ex_B\nx,A1,dog,puppy\n,A1,cat,kitten\n", PAIRS),
    ("a row that is there twice: both count as rows, one of them as a demo", HEADER + "A1,dog,puppy\nA1,dog,puppy\n", {"A1": [("dog", "puppy")] * 2}),
    ("words in any script, with commas, quotes, marks of writing direction", HEADER + 'A1,"a, ""b""",日本\nA1,=1+1,\u202eשלום\n', {"A1": [('a, "b"', "日本"), ("=1+1", "\u202eשלום")]}),
]  # fmt: skip
"""What looks odd and is read all the same: (what, CSV, what it is read as)."""


def page() -> str:
    """docs/bad_input.md up to its chapter on fuzzing."""

    def table(rows: list[Row]) -> list[str]:
        cell = [(row.wrong, row.says.replace("|", "\\|").replace("`", "'"), row.code) for row in rows]
        return [
            "| what is wrong | what relfv says | exit code |",
            "|---|---|---|",
            *(f"| {a} | `{b}` | {c} |" for a, b, c in cell),
        ]

    return "\n".join([
        "# Bad input", "",
        "Whatever is wrong with what relfv is given, it says in one line: what, where, what was found, what was expected. The "
        "exit code is 2 where nothing was computed, 1 where a run failed. A traceback is shown under `--debug` only. Nothing "
        "is written or moved before the CSV, the settings and the model have proved good, so the folder of results is "
        "then as it was, also with `--force`. Of a CSV all bad rows are reported at once: ten, then a count.", "",
        "`$CSV`, `$MODEL` and `$OUT` stand for the paths given, … for what differs from case to case. The tables are written from "
        "the list that `tests/test_bad_input.py` tests row by row (`pytest tests/test_bad_input.py --write-bad-input`).", "",
        "## The relation CSV", "", *table(CSV_ROWS), "",
        "Read all the same:", "", *(f"- {what}" for what, *_ in ACCEPTED), "",
        "## The model", "", *table(MODEL_ROWS), "",
        "A tokenizer without BOS, a tokenizer without a fast version (which gives each prompt to Python code of transformers, "
        "never to code of the model's) and weights as a `.bin` file of nothing but tensors all work.", "",
        "## Flags", "", *table(FLAG_ROWS), "",
        "A q_id that is named twice in `--q_list`, or a layer in `--layers`, is taken once.", "",
        "## What only shows with the words and the tokenizer together", "",
        "Such a q_id is recorded as failed, with the reason, and the others run.", "", *table(FAILED_ROWS), "",
        "A q_id whose longest prompt, with its answer, is longer than the model has positions for (`max_position_embeddings` and its "
        "other names; none with ALiBi) is skipped with that reason before anything is computed. Beyond a sliding window, or beyond the length that a "
        "model was made with before its rotary positions were scaled, it runs, and `context_notes` in `sampled_trials.json` says so.", "",
    ])  # fmt: skip
