"""Pools that change: weights that stay are the same bit for bit, what comes is what PEFT computes with it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from dsmixer.adapters.importing import BaseMismatchWarning, import_adapters
from dsmixer.adapters.loading import load_mixture
from dsmixer.adapters.mixture_folder import read_description, save_mixture
from dsmixer.adapters.pool_facts import pool_facts
from dsmixer.adapters.pool_merge import merge_mixtures
from dsmixer.adapters.pools import add_experts, remove_experts, rename_experts
from dsmixer.adapters.router_rows import starts
from dsmixer.config.errors import UserError
from dsmixer.model.inject import route_to


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def routers_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "routers.safetensors")


def logits(folder, token_ids, expert=..., **options):
    model, _ = load_mixture(folder, **options)
    with torch.no_grad():
        if expert is ...:
            return model(token_ids).logits
        with route_to(model, expert):
            return model(token_ids).logits


@pytest.fixture
def saved(make_mixture, base_folder, tmp_path):
    """Saves a mixture on its base under a name."""

    def save(name="m", kind="llama", **options):
        options = {"experts": ["law", "chess", "math"], "ranks": {"law": 4}, "alphas": {"law": 8}, **options}
        options = {"rank": 6, "alpha": 3.5, **options}
        return save_mixture(make_mixture(kind, **options), tmp_path / name, base=str(base_folder(kind)))

    return save


@pytest.fixture
def adapter(load_base, tmp_path):
    """Makes a PEFT adapter with weights that matter, and what PEFT computes with it."""

    def make(token_ids, name="adapter", kind="llama", **options):
        options = {"target_modules": ["q_proj", "v_proj"], "r": 5, "lora_alpha": 12, **options}
        model = peft.get_peft_model(load_base(kind), peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.normal_(0.0, 0.3, generator=generator)
            wanted = model(token_ids).logits
        model.save_pretrained(tmp_path / name)
        return tmp_path / name, wanted

    return make


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("of_adapter", [False, True])
def test_an_added_expert_computes_what_peft_computes_and_the_others_keep_every_bit(
    saved, adapter, load_base, token_ids, tmp_path, rslora, of_adapter
):
    """Whichever of mixture and adapter are rsLoRA; also of ranks and alphas that differ by projection."""
    source = saved(rslora=rslora)
    folder, wanted = adapter(
        token_ids, use_rslora=of_adapter, rank_pattern={"v_proj": 3}, alpha_pattern={"q_proj": 7}
    )
    changed = add_experts(source, {"new": folder}, tmp_path / "grown")
    assert changed.experts == ("law", "chess", "math", "new")
    torch.testing.assert_close(logits(changed.folder, token_ids, "new"), wanted, rtol=1e-5, atol=1e-5)
    for name in ("law", "chess", "math", None):
        assert torch.equal(logits(changed.folder, token_ids, name), logits(source, token_ids, name))
    before, after = files_of(source), files_of(changed.folder)
    assert all(after[file] == data for file, data in before.items() if file.startswith("experts/"))
    assert (
        after["experts/new/adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()
    )
    rows, grown = routers_of(source), routers_of(changed.folder)
    assert all(grown[key].shape[0] == 4 and torch.equal(grown[key][:3], rows[key]) for key in rows)
    alone = peft.PeftModel.from_pretrained(load_base("llama"), changed.folder / "experts" / "new").eval()
    with torch.no_grad():
        torch.testing.assert_close(alone(token_ids).logits, wanted, rtol=1e-5, atol=1e-5)


def test_a_new_row_is_the_mean_of_the_others_so_its_probability_is_their_geometric_mean():
    """Also where a constant is added to all rows, which changes no probability."""
    generator = torch.Generator().manual_seed(0)
    rows, x_TD = torch.randn(5, 16, generator=generator), torch.randn(200, 16, generator=generator)
    for shift in (0.0, 3.0):
        weight_ED = rows + shift
        new = starts["mean"](weight_ED, 1, 0.02, torch.Generator().manual_seed(1))
        p_TE = (x_TD @ torch.cat((weight_ED, new)).T).double().softmax(1)
        geometric = p_TE[:, :5].log().mean(1).exp()
        torch.testing.assert_close(p_TE[:, 5], geometric, rtol=2e-2, atol=0.0)
        assert (p_TE[:, 5] <= 1 / 6 + 1e-3).all() and p_TE[:, 5].min() < 1e-2


def test_several_new_rows_differ_and_depend_on_names_and_seed_alone(saved, adapter, token_ids, tmp_path):
    source, (folder, _) = saved(), adapter(token_ids)
    one, two = (
        routers_of(add_experts(source, {"a": folder, "b": folder}, tmp_path / name).folder) for name in "xy"
    )
    assert all(torch.equal(one[key], two[key]) and not torch.equal(one[key][3], one[key][4]) for key in one)


def test_projections_that_only_an_adapter_has_get_mixers_if_asked(saved, adapter, token_ids, tmp_path):
    source = saved(targets=["q", "v"])
    folder, wanted = adapter(token_ids, target_modules=["q_proj", "up_proj"])
    with pytest.raises(UserError, match="no mixer on model.layers.0.mlp.up_proj, model.layers.1.mlp.up_proj"):
        add_experts(source, {"new": folder}, tmp_path / "grown")
    assert not (tmp_path / "grown").exists()
    grown = add_experts(source, {"new": folder}, tmp_path / "grown", extend=True).folder
    torch.testing.assert_close(logits(grown, token_ids, "new"), wanted, rtol=1e-5, atol=1e-5)
    for name in ("law", "chess", "math"):
        assert torch.equal(logits(grown, token_ids, name), logits(source, token_ids, name))
    assert len(routers_of(grown)) == 6 and len(routers_of(source)) == 4


def test_removing_an_expert_takes_its_row_and_nothing_else(saved, token_ids, tmp_path):
    source = saved(top_k=2)
    changed = remove_experts(source, ["chess"], tmp_path / "less")
    assert changed.experts == ("law", "math") and not (changed.folder / "experts" / "chess").exists()
    for name in ("law", "math", None):
        assert torch.equal(logits(changed.folder, token_ids, name), logits(source, token_ids, name))
    rows, left = routers_of(source), routers_of(changed.folder)
    assert all(torch.equal(left[key], rows[key][[0, 2]]) for key in rows)
    last = remove_experts(changed.folder, ["law"], tmp_path / "one")
    assert read_description(last.folder)[1].top_k == 1 and "top_k is now 1" in last.notes[0]
    assert torch.equal(logits(last.folder, token_ids), logits(source, token_ids, "math"))
    with pytest.raises(UserError, match="no expert would be left"):
        remove_experts(last.folder, ["math"], tmp_path / "none")


def test_adding_and_removing_again_gives_the_mixture_of_before(saved, adapter, token_ids, tmp_path):
    """Routed by its routers too; K, which was left to the number of experts, stays."""
    source, (folder, _) = saved(), adapter(token_ids)
    grown = add_experts(source, {"new": folder}, tmp_path / "grown").folder
    back = remove_experts(grown, ["new"], tmp_path / "back").folder
    assert torch.equal(logits(back, token_ids), logits(source, token_ids))
    assert not torch.equal(logits(grown, token_ids), logits(source, token_ids))
    wanted = dataclasses.replace(read_description(source)[1], top_k=3)
    found = read_description(back)[1]
    assert found.default_routing() == wanted.default_routing() and found.experts == wanted.experts
    assert (found.rank_list, found.alpha_list) == (wanted.rank_list, wanted.alpha_list)


def test_renaming_changes_names_alone_and_two_may_swap(saved, token_ids, tmp_path):
    source = saved()
    changed = rename_experts(source, {"law": "chess", "chess": "law", "math": "sums"}, tmp_path / "renamed")
    assert changed.experts == ("chess", "law", "sums")
    for old, new in (("law", "chess"), ("chess", "law"), ("math", "sums")):
        assert torch.equal(logits(changed.folder, token_ids, new), logits(source, token_ids, old))
    assert torch.equal(logits(changed.folder, token_ids), logits(source, token_ids))
    assert files_of(source)["routers.safetensors"] == files_of(changed.folder)["routers.safetensors"]


@pytest.mark.parametrize("rslora", [(False, True), (True, False)])
def test_merged_mixtures_keep_every_expert_and_stack_their_routers(saved, token_ids, tmp_path, rslora):
    """Of other ranks, scaled in other ways and on other projections; rows that were not there are new."""
    one = saved("one", rslora=rslora[0], targets=["q", "v"])
    two = saved("two", rslora=rslora[1], experts=["law", "code"], ranks={"code": 9}, alphas={})
    with pytest.raises(UserError, match="an expert is called 'law' already"):
        merge_mixtures(one, two, tmp_path / "merged")
    merged = merge_mixtures(one, two, tmp_path / "merged", prefix="b.")
    assert merged.experts == ("law", "chess", "math", "b.law", "b.code")
    # a rank of 6 among ranks of 9 is multiplied in other sizes, which not every processor rounds alike
    pairs = [(name, one, name) for name in ("law", "chess", "math")]
    for name, folder, own in [*pairs, ("b.law", two, "law"), ("b.code", two, "code")]:
        ours, theirs = logits(merged.folder, token_ids, name), logits(folder, token_ids, own)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    first, second, both = (routers_of(folder) for folder in (one, two, merged.folder))
    assert both.keys() == second.keys() > first.keys()
    for key, weight_ED in both.items():
        assert torch.equal(weight_ED[3:], second[key])
        assert key not in first or torch.equal(weight_ED[:3], first[key])


def test_the_card_and_the_description_say_what_was_done_and_carry_no_stale_figures(
    saved, adapter, token_ids, tmp_path
):
    source, (folder, _) = saved(), adapter(token_ids)
    grown = add_experts(source, {"new": folder}, tmp_path / "grown").folder
    renamed = rename_experts(grown, {"new": "newer"}, tmp_path / "renamed").folder
    card = (renamed / "README.md").read_text()
    assert "- added new; their rows" in card and "- renamed new to newer" in card and "| newer |" in card
    assert json.loads((renamed / "mixer_config.json").read_text())["history"][-1] == "renamed new to newer"
    facts = pool_facts(renamed)
    assert [expert["name"] for expert in facts["experts"]] == ["law", "chess", "math", "newer"]
    assert facts["experts"][3]["row_distance"] < 0.01 * facts["experts"][0]["row_distance"]


def test_nothing_is_overwritten_unless_in_place(saved, token_ids, tmp_path):
    source = saved()
    before = files_of(source)
    for out in (source, saved("other")):
        with pytest.raises(UserError, match="something else is there already"):
            remove_experts(source, ["law"], out)
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="something else is there already"):
        remove_experts(source, ["law"], tmp_path / "papers", in_place=True)
    assert files_of(source) == before
    kept = logits(source, token_ids, "math")
    remove_experts(source, ["law"], source, in_place=True)
    assert torch.equal(logits(source, token_ids, "math"), kept)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


HOSTILE = ["../out", "/etc/law", "..", ".hidden", "a/b", "", "law\n", "läw", "x" * 101, "chess"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_leaves_the_folder_or_is_taken_is_refused_and_nothing_written(
    saved, adapter, token_ids, tmp_path, name
):
    source, (folder, _) = saved(), adapter(token_ids)
    for change in (
        lambda: add_experts(source, {name: folder}, tmp_path / "out"),
        lambda: rename_experts(source, {"law": name}, tmp_path / "out"),
    ):
        with pytest.raises(UserError, match="can't be the name of an expert|is called 'chess' already"):
            change()
    if name != "chess":
        with pytest.raises(UserError, match="no expert is called"):
            remove_experts(source, [name], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "m"]


def test_only_the_two_files_of_an_adapter_come_along(saved, adapter, token_ids, tmp_path):
    source, (folder, _) = saved(), adapter(token_ids)
    (folder / "optimizer.pt").write_bytes(b"a pickle")
    grown = add_experts(source, {"new": folder}, tmp_path / "grown").folder
    names = sorted(path.name for path in (grown / "experts" / "new").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]


def test_an_adapter_that_lies_there_as_a_pickle_is_written_as_safetensors(
    saved, adapter, load_base, token_ids, tmp_path
):
    source, (folder, wanted) = saved(), adapter(token_ids, rank_pattern={"v_proj": 3})
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    grown = add_experts(source, {"new": folder}, tmp_path / "grown").folder
    torch.testing.assert_close(logits(grown, token_ids, "new"), wanted, rtol=1e-5, atol=1e-5)
    assert not list(grown.rglob("*.bin"))
    alone = peft.PeftModel.from_pretrained(load_base("llama"), grown / "experts" / "new").eval()
    with torch.no_grad():
        torch.testing.assert_close(alone(token_ids).logits, wanted, rtol=1e-5, atol=1e-5)


def test_an_adapter_of_other_widths_and_mixtures_of_other_kinds_are_refused(
    saved, adapter, token_ids, tmp_path
):
    source = saved()
    folder, _ = adapter(token_ids)
    tensors = load_file(folder / "adapter_model.safetensors")
    wide = {key: torch.cat((t, t), dim=1) if "lora_A" in key else t for key, t in tensors.items()}
    save_file(wide, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="the adapter maps 64 to 32, the mixture 32 to 32"):
        add_experts(source, {"new": folder}, tmp_path / "grown")
    gpt2 = saved("gpt2", kind="gpt2", experts=["other"], ranks={}, alphas={})
    with pytest.raises(UserError, match="base is llama in the one and gpt2 in the other"):
        merge_mixtures(source, gpt2, tmp_path / "merged")
    block = saved("block", router="per_block", experts=["other"], ranks={}, alphas={})
    with pytest.raises(UserError, match="router is per_projection in the one and per_block in the other"):
        merge_mixtures(source, block, tmp_path / "merged")
    (source / "experts" / "law" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="the expert law is not whole"):
        remove_experts(source, ["chess"], tmp_path / "less")


def test_a_block_whose_experts_leave_a_projection_out_is_saved_loaded_and_changed(
    load_base, base_folder, adapter, token_ids, tmp_path
):
    """The router of the block stands in the files by the projection that owns it; k has no weights there."""
    few, _ = adapter(token_ids, "few")
    all_four, _ = adapter(token_ids, "all", target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    model = load_base("llama")
    mixture = import_adapters(
        model, {"few": few, "all": all_four}, targets=["q", "k", "v", "o"], router="per_block"
    )
    save_mixture(mixture, tmp_path / "both", base=str(base_folder("llama")))
    wanted = logits(tmp_path / "both", token_ids, "few")
    remove_experts(tmp_path / "both", ["all"], tmp_path / "one")
    # o has a block of its own, and nobody has weights there any more; k shares the router of q and v
    assert torch.equal(logits(tmp_path / "one", token_ids, "few"), wanted)


def test_a_mixture_of_one_grows_to_rows_that_differ_and_a_router_that_can_learn(
    saved, adapter, token_ids, tmp_path
):
    source = saved(experts=["law"], ranks={}, alphas={})
    first, second = (adapter(token_ids, name)[0] for name in ("one", "two"))
    add_experts(source, {"chess": first, "math": second}, tmp_path / "grown")
    for rows in routers_of(tmp_path / "grown").values():
        assert rows.unique(dim=0).shape[0] == 3
    assert read_description(tmp_path / "grown")[1].default_routing().top_k == 3


def test_names_that_differ_by_case_alone_are_taken(saved, adapter, token_ids, tmp_path):
    folder, _ = adapter(token_ids)
    with pytest.raises(UserError, match="'LAW' already"):
        add_experts(saved(), {"LAW": folder}, tmp_path / "grown")


def test_a_mixture_is_changed_from_inside_its_folder(saved, tmp_path, monkeypatch):
    source = saved()
    monkeypatch.chdir(source)
    rename_experts(".", {"law": "laws"}, ".", in_place=True)
    assert "laws" in read_description(source)[1].experts
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(UserError, match="it is a link"):
        rename_experts(source, {"laws": "law"}, tmp_path / "link", in_place=True)


def test_another_base_of_the_same_kind_is_told(saved, base_folder, tmp_path):
    other = shutil.copytree(base_folder("llama"), tmp_path / "another-llama")
    with pytest.warns(BaseMismatchWarning, match="another-llama"):
        load_mixture(saved(), base=other)


def test_a_licence_stays_and_what_lies_beside_an_adapter_is_told(
    saved, make_mixture, base_folder, adapter, token_ids, tmp_path
):
    mixture = make_mixture("llama", experts=["law", "chess"], rank=6, alpha=3.5)
    base = str(base_folder("llama"))
    source = save_mixture(mixture, tmp_path / "m", base=base, facts={"license": "apache-2.0"})
    folder, _ = adapter(token_ids)
    (folder / "value_head.bin").write_bytes(b"trained")
    changed = add_experts(source, {"go": folder}, tmp_path / "grown")
    assert any("value_head.bin" in note for note in changed.notes)
    assert "\nlicense: apache-2.0\n" in (tmp_path / "grown" / "README.md").read_text()
