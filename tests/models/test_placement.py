"""Where weights go, decided from sizes alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conftest import scale_up
from relfv.cli import main
from relfv.errors import InputError
from relfv.language_model import open_model
from relfv.models import memory, placement
from relfv.models.architecture import resolve
from relfv.models.cards import cards_bytes
from relfv.models.placement import Placement, Sizes, bytes_of_prompt, card_bytes, plan, sizes_of
from relfv.models.size import stored_names
from zoo import ZOO

GB = 10**9
BLOCKS = Sizes(blocks=(2 * GB,) * 80, rest=4 * GB, made=(0,) * 80)


def planned(offload: str = "auto", sizes: Sizes = BLOCKS, **room: Any) -> Placement:
    return plan("m", offload, sizes, **{"card": 70 * GB, "one_prompt": 3 * GB, "waiting": GB, "host": 300 * GB, **room})


def counts(found: Placement) -> tuple[int, int, int]:
    return len(found.resident), len(found.host), len(found.disk)


def test_what_fits_with_a_pass_stays_on_the_card() -> None:
    assert counts(planned(card=165 * GB)) == (80, 0, 0)  # 164 + 3, of which 2 are slack
    assert counts(planned(card=None)) == (80, 0, 0)
    assert not planned(card=165 * GB).streams
    assert planned(card=164 * GB).streams


def test_else_half_of_what_is_left_is_for_passes_and_half_for_the_first_layers() -> None:
    found = planned()
    assert counts(found) == (15, 65, 0)  # 70 - 4 - 3 slots of 2 = 60 GB
    assert found.resident == tuple(range(15))
    assert found.card_bytes == (4 + 6 + 30) * GB
    assert found.host_bytes == 130 * GB


def test_several_processes_on_a_card_hold_the_weights_or_it_is_said() -> None:
    """Weights that stream through one card for several processes would wait for one bus."""
    memory.share_cards(2)
    try:
        assert not planned(card=165 * GB).streams
        with pytest.raises(InputError, match=r"2 processes on a card have 70\.0 GB each, too little for weights, 164"):
            planned()
        assert counts(planned("cpu")) == (0, 80, 0)  # asked for
    finally:
        memory.share_cards(1)


def test_each_of_several_processes_counts_on_its_part_of_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    device, arch = torch.device("cuda", 0), resolve(next(iter(ZOO.values())).build(), "auto")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 << 30))
    alone = card_bytes(device, arch), cards_bytes([device], arch)[0]
    memory.share_cards(2)
    shared = card_bytes(device, arch), cards_bytes([device], arch)[0]
    memory.share_cards(1)
    for whole, part in zip(alone, shared, strict=True):
        assert whole - part == pytest.approx(0.5 * 0.9 * (80 << 30), rel=0.06)
    assert (card_bytes(device, arch), cards_bytes([device], arch)[0]) == alone


def test_passes_take_no_more_than_a_few_trials_need_while_all_others_wait() -> None:
    assert counts(planned(waiting=GB // 5)) == (21, 59, 0)  # 4 of 3 GB, and 25 of 0.2


def test_what_the_host_cannot_hold_streams_from_files() -> None:
    found = planned(host=100 * GB)
    assert counts(found) == (15, 45, 20)
    assert (found.host_bytes, found.disk_bytes) == (90 * GB, 40 * GB)
    assert found.disk == tuple(range(60, 80))


def test_all_blocks_stream_where_that_is_asked_for() -> None:
    assert counts(planned("cpu")) == (0, 80, 0)
    assert counts(planned("disk")) == (0, 0, 80)
    assert counts(planned("none", card=GB)) == (80, 0, 0)
    assert counts(planned("cpu", card=None, host=None)) == (0, 80, 0)


def test_a_host_that_is_too_small_is_one_line() -> None:
    with pytest.raises(InputError) as caught:
        planned("cpu", host=100 * GB)
    assert str(caught.value) == (
        "--model 'm': the weights that stream take 160.0 GB of host memory, and 90.0 GB are there for them; use "
        "--offload disk, or a machine with more memory"
    )


def test_weights_that_no_file_holds_in_this_form_take_host_memory_in_any_case() -> None:
    sizes = Sizes(BLOCKS.blocks, BLOCKS.rest, made=(GB,) * 80)
    found = planned(sizes=sizes, host=100 * GB)
    assert counts(found) == (15, 25, 40)  # 65 GB of them, and 25 GB for the other half of the first layers
    assert found.host_bytes == (50 + 40) * GB
    with pytest.raises(InputError, match="its files hold them in another form than they are computed with"):
        planned("disk", sizes, host=50 * GB)


def test_a_card_that_holds_not_even_the_slots_is_one_line() -> None:
    with pytest.raises(InputError) as caught:
        planned(card=12 * GB)
    assert str(caught.value) == (
        "--model 'm': of its weights what does not stream takes 4.0 GB, 3 blocks that do 6.0 GB and a pass over one "
        "prompt 3.0 GB, and the card has 12.0 GB for them; use --precision fast, --quant 4bit or a larger card"
    )


def test_in_words() -> None:
    assert str(planned(host=100 * GB)) == (
        "15 of 80 layers on the device (40.0 GB with the slots), 45 stream from host memory (90.0 GB), 20 stream from "
        "their files (40.0 GB)"
    )
    assert str(planned(card=None)) == "all 80 layers on the device, 164.0 GB"


def test_experts_that_are_joined_while_loading_are_in_no_file(tmp_path: Path) -> None:
    model = scale_up(next(one for name, one in ZOO.items() if name.startswith("Mixtral")).build())
    model.save_pretrained(tmp_path)
    arch = resolve(model, "auto")
    sizes = sizes_of(model, arch, stored_names(tmp_path), converted=False)
    experts = [sum(p.nbytes for name, p in block.named_parameters() if "experts" in name) for block in arch.blocks]
    # Beside them the router, which files know by another name: its memory is counted twice rather than not at all.
    assert sizes.made == pytest.approx(experts, rel=0.01)
    assert sizes_of(model, arch, stored_names(tmp_path), converted=True).made == sizes.blocks
    assert sum(sizes.blocks) + sizes.rest == sum(p.nbytes for p in model.parameters())


def test_a_prompts_pass_takes_the_rows_of_all_its_copies() -> None:
    arch = resolve(ZOO["Llama 2, Llama 3: grouped keys"].build(), "auto")
    one = bytes_of_prompt(arch, 0, 10)
    assert one == 4 * (3 * 64 + 6 * 48 + 3 * 80 + 3 * 8 * 10)
    assert bytes_of_prompt(arch, 24, 10) == 25 * one


def test_the_run_says_before_loading_that_the_host_is_too_small(
    llama_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "available_bytes", lambda **_: 50_000)
    with pytest.raises(InputError, match=r"take 0.0 GB of host memory, and 0.0 GB are there"):
        open_model(str(llama_path), device="cpu", offload="cpu")
    assert open_model(str(llama_path), device="cpu", offload="disk").backbone.streaming


def test_packed_weights_do_not_stream(llama_path: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="packed weights do not stream; use --offload none"):
        open_model(str(llama_path), device="cpu", quant="8bit", offload="cpu")


def test_a_rehearsal_says_where_weights_would_be_and_loads_none(
    llama_path: Path, csv_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(llama_path), "--relation_csv_path", str(csv_path), "--out_root", str(tmp_path / "out")]
    assert main(["run", *arguments, "--device", "cpu", "--offload", "disk", "--dry_run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "0 of 3 layers on the device (0.0 GB with the slots), 3 stream from their files (0.0 GB)" in said


def test_page_cache_of_a_control_group_counts_as_free(tmp_path: Path) -> None:
    """Files just copied or read fill it, and it is given back on demand."""
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    assert memory._of_group(tmp_path) == 100
    (tmp_path / "memory.stat").write_text("anon 200\ninactive_file 300\nactive_file 50\nslab 7\n")
    assert memory._of_group(tmp_path) == 450
