"""Beyond one device, without a GPU: two processes of DDP and FSDP2 over gloo against one, launch files, adapters, 4 bits."""

import json
import os
import signal
from types import SimpleNamespace

import pytest
import yaml
from fsdp import use_fsdp2
from test_train import THINGS, groups, metrics_of, pairs
from tiny import ROOT, bpe_tokenizer, causal_lm, chatml_tokenizer, reward_model, run_program, save, write

import torch
import transformers
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors import safe_open
from safetensors.torch import load_file

import eval as eval_package
import model as model_file
import reward
import tables
import train
from data import load_tokenizer
from model import adapter_base, fingerprint, load_policy, load_reward_model, lr_at, sequence_logps

MODELS = {"llama, tied head": ("llama", True), "llama": ("llama", False), "qwen2, tied head": ("qwen2", True), "gpt_neox": ("gpt_neox", False)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scale")
    tokenizer, judge_tokenizer = chatml_tokenizer(), bpe_tokenizer(vocab_size=350)
    judge = reward_model("qwen2", vocab_size=len(judge_tokenizer), initializer_range=0.2, hidden=64)
    policies = {name: save(folder / name.split(",")[0] / str(tied), causal_lm(architecture, vocab_size=len(tokenizer), tied=tied, initializer_range=0.1, hidden=64), tokenizer) for name, (architecture, tied) in MODELS.items()}
    return SimpleNamespace(
        folder=folder, policies=policies, policy=policies["llama, tied head"], judge=save(folder / "judge", judge, judge_tokenizer),
        data=write(folder / "pairs.jsonl", pairs(THINGS[:10])), groups=write(folder / "groups.jsonl", groups(THINGS)),
    )  # fmt: skip


def words(world, out, more="", **flags):
    usual = {"model": world.policy, "reward_model": world.judge, "data": world.data, "output_dir": out, "batch_size": 4, "accum": 2, "max_steps": 4, "lr": 1e-3, "save_every": 0, "max_response_tokens": 16}
    usual |= {"normalize_weights": ""}  # weights of random models are in the thousands; at that scale float32 sums hide what is compared
    return [str(w) for flag, value in (usual | flags).items() for w in (f"--{flag}", value) if w != ""] + more.split()


def start(argv, folder, before=None, processes=1, program=train):
    status, out, err = run_program(program, argv, folder, before, processes)
    assert status == 0, err[-3000:]
    return out


def logits_of(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


def final_weights(out):
    return load_file(next(out.glob("*model.safetensors")))


# ----------------------------------------------------------------------------------------------------------------------
# Two processes walk where one does


def in_small_chunks(before=None):
    """A `before` under which the head works in many chunks, as it does at every real vocabulary."""

    def small_chunks():
        if before:
            before()
        model_file.LOGITS_CHUNK = {"cpu": 4000}

    return small_chunks


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_of_ddp_and_fsdp2_follow_the_curve_of_one(world, tmp_path, name):
    """The same global list of micro-batches, two a process and step: losses, gradient norms and learning rates to 1e-4, the head in one chunk
    there and in several here; the folders hold the same tensors under the same names."""
    model, sharded = world.policies[name], use_fsdp2(train, cpu_ram_efficient_loading=True)
    for run, before, processes in (("one", None, 1), ("ddp", in_small_chunks(), 2), ("fsdp2", in_small_chunks(sharded), 2)):
        start(words(world, tmp_path / run, model=model, eval_fraction=0.2, eval_prompts=2, accum=4), tmp_path, before, processes)
    one, evals = metrics_of(tmp_path / "one")
    assert len({step["loss"] for step in one}) == 4
    for run in ("ddp", "fsdp2"):
        steps, other_evals = metrics_of(tmp_path / run)
        answers = [(tmp_path / which / "eval" / "step_0.jsonl").read_text() for which in ("one", run)]
        assert answers[0] == answers[1] != "" and (tmp_path / run / "eval" / "rewards.jsonl").exists()  # sampled by the sharded model itself
        for a, b in zip(one, steps, strict=True):
            assert a["lr"] == b["lr"] and a["rows"] == b["rows"] and a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        for a, b in zip(evals, other_evals, strict=True):
            assert a["eval/loss"] == pytest.approx(b["eval/loss"], rel=1e-4)
        weights = final_weights(tmp_path / run)
        assert set(weights) == set(final_weights(tmp_path / "one")) and all(w.dtype == torch.float32 for w in weights.values())
        torch.testing.assert_close(logits_of(tmp_path / run), logits_of(tmp_path / "one"), rtol=1e-3, atol=2e-3)
    assert json.loads((tmp_path / "fsdp2" / "config.json").read_text())["architectures"] == json.loads((tmp_path / "one" / "config.json").read_text())["architectures"]


def test_fsdp2_shards_the_layers_the_model_names_and_keeps_float32_master_weights(world, tmp_path):
    """Each decoder layer of Llama, Qwen2 and GPT-NeoX is a unit of its own; under bf16 what AdamW steps is float32."""

    def look():
        use_fsdp2(train, mixed_precision="bf16")()
        prepare_adamw, check = train.adamw, train.check_master_weights

        def adamw(model, *rest):
            look.model = model
            return prepare_adamw(model, *rest)

        def checked(optimizer, dtype):
            units = [type(m).__name__ for m in look.model.modules() if type(m).__name__.startswith("FSDP") and type(m).__name__.endswith("Layer")]
            print("UNITS", units, {str(p.dtype) for group in optimizer.param_groups for p in group["params"]})
            check(optimizer, dtype)

        train.adamw, train.check_master_weights = adamw, checked

    for name, layer in {"llama": "FSDPLlamaDecoderLayer", "qwen2, tied head": "FSDPQwen2DecoderLayer", "gpt_neox": "FSDPGPTNeoXLayer"}.items():
        printed = start(words(world, tmp_path / layer, model=world.policies[name], loss="sft", max_steps=1), tmp_path, look, 2)
        assert f"UNITS ['{layer}', '{layer}'] {{'torch.float32'}}" in printed


def test_fsdp2_in_bf16_returns_float32_log_probs_and_reduces_gradients_in_float32(world, tmp_path):
    """accelerate's own policy rounds what the root module returns, and the gradients it averages, to bfloat16."""

    def look():
        use_fsdp2(train, mixed_precision="bf16")()
        original = train.sequence_logps

        def sequence_logps(model, **batch):
            logps = original(model, **batch)
            policy = model._get_fsdp_state()._mp_policy
            print("LOGPS", logps.dtype, bool((logps == logps.bfloat16()).all()), policy.param_dtype, policy.reduce_dtype, policy.output_dtype)
            return logps

        train.sequence_logps = sequence_logps

    printed = start(words(world, tmp_path / "run", loss="sft", max_steps=1, normalize_weights=""), tmp_path, look, 2)
    assert "LOGPS torch.float32 False torch.bfloat16 torch.float32 None" in printed


def test_fsdp2_in_4_bits_follows_one_process_in_4_bits(world, tmp_path):
    """The same quantised base and adapter, sharded or whole: losses to the rounding of bfloat16."""
    more = "--lora_rank 2 --load_in_4bit"
    for run, before, processes in (("one", None, 1), ("two", use_fsdp2(train, mixed_precision="bf16"), 2)):
        start(words(world, tmp_path / run, more, loss="sft", lr=1e-2), tmp_path, before, processes)
    (one, _), (two, _) = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    assert one[0]["loss"] - one[-1]["loss"] > 0.05  # it learns: more than the tolerance below
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=0.03)


def test_master_weights_of_another_type_are_refused():
    """accelerate 1.13's upcast under FSDP2 did nothing, in silence."""
    weights = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="bfloat16.*not float32"):
        model_file.check_master_weights(torch.optim.AdamW([weights]), "float32")
    model_file.check_master_weights(torch.optim.AdamW([weights]), "bfloat16")


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp2 in 4 bits", "4 bits"])
def test_a_kill_and_a_resume_end_in_the_same_weights(world, tmp_path, kind):
    """Killed in the third of four steps, with a checkpoint after the second."""
    more = "--lora_rank 2 --load_in_4bit" if "4 bits" in kind else ""
    four = "4 bits" in kind
    sharded = use_fsdp2(train, cpu_ram_efficient_loading=not four, mixed_precision="bf16" if four else None) if "fsdp2" in kind else None
    processes = 2 if sharded else 1

    def die():
        if sharded:
            sharded()
        original = train.lr_at
        train.lr_at = lambda step, *rest: os.kill(os.getpid(), signal.SIGKILL) if step == 2 else original(step, *rest)

    start(words(world, tmp_path / "whole", more, save_every=2), tmp_path, sharded, processes)
    assert run_program(train, words(world, tmp_path / "cut", more, save_every=2), tmp_path, die, processes)[0] == -9
    assert "resuming after step 2" in start(words(world, tmp_path / "cut", more + " --resume", save_every=2), tmp_path, sharded, processes)
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "whole")
    one, two = final_weights(tmp_path / "whole"), final_weights(tmp_path / "cut")
    assert set(one) == set(two) and all(torch.equal(one[k], two[k]) for k in one)
    if "4 bits" in kind and not sharded:  # the frozen base is not written again
        written = sum(f.stat().st_size for f in (tmp_path / "whole" / "checkpoints").rglob("*") if f.is_file())
        assert written < 8 * sum(w.nbytes for w in one.values()) + 30_000


def test_tables_of_two_processes_are_those_of_one(world, tmp_path, monkeypatch):
    """Five micro-batches in pieces of one, so that the processes have three and two; also where FSDP would let one process load for all."""
    monkeypatch.setattr(tables, "PIECE", 1)
    argv = ["--model", world.policy, "--reward_model", world.judge, "--data", world.data, "--batch_size", "4", "--max_response_tokens", "16", "--out"]
    for name, before, processes in (("one", None, 1), ("ddp", None, 2), ("fsdp2", use_fsdp2(tables, cpu_ram_efficient_loading=True), 2)):
        start([*argv, str(tmp_path / name)], tmp_path, before, processes, tables)
    one = load_file(tmp_path / "one")
    assert len(one["rewards"]) == 5 and one["rewards"].isfinite().all() and one["ref_logps"].isfinite().all()
    for name in ("ddp", "fsdp2"):
        for key, value in load_file(tmp_path / name).items():
            torch.testing.assert_close(value, one[key], rtol=1e-5, atol=1e-5)


def test_the_schedule_ends_at_zero_for_any_number_of_processes(world, tmp_path):
    """It is a function of the step alone; a scheduler that accelerate prepares would run twice as fast on two."""
    assert lr_at(100, 100, 3, 1e-5) == 0 and lr_at(3, 100, 3, 1e-5) == 1e-5
    rates = []
    for processes in (1, 2):
        start(words(world, tmp_path / str(processes), loss="sft", max_steps=6), tmp_path, None, processes)
        rates.append([step["lr"] for step in metrics_of(tmp_path / str(processes))[0]])
    assert rates[0] == rates[1] == [lr_at(step, 6, 1, 1e-3) for step in range(6)] and rates[0][-1] < 0.1 * rates[0][0]


# ----------------------------------------------------------------------------------------------------------------------
# Launch files


@pytest.mark.parametrize("name, processes, machines", [("one_gpu", 1, 1), ("fsdp2", 8, 1), ("fsdp2_multinode", 32, 4), ("fsdp2_4bit", 8, 1)])
def test_accelerate_reads_the_launch_files(name, processes, machines, monkeypatch):
    """No key is unknown, and what reaches the processes is what the file says: FSDP2, full state dicts, bf16."""
    file = ROOT / "configs" / f"{name}.yaml"
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(file), "train.py", "--model", "x"]))
    assert (args.num_processes, args.num_machines, args.mixed_precision) == (processes, machines, "bf16")
    if name == "one_gpu":
        return
    for key, value in prepare_multi_gpu_env(args).items():
        monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.state_dict_type.name == "FULL_STATE_DICT" and plugin.transformer_cls_names_to_wrap is None
    assert plugin.cpu_ram_efficient_loading == (name != "fsdp2_4bit") and plugin.reshard_after_forward is True
    assert "accelerate launch --config_file" in file.read_text() and yaml.safe_load(file.read_text())["num_processes"] == processes


# ----------------------------------------------------------------------------------------------------------------------
# Adapters and 4 bits


@pytest.fixture(scope="module")
def quantised(world):
    """SFT with an adapter on a 4-bit model, then VAR from it, merged."""
    sft, out = world.folder / "sft4", world.folder / "var4"
    start(words(world, sft, "--load_in_4bit --lora_rank 2 --loss sft --responses all", lr=1e-2, accum=1, max_steps=6), world.folder)
    printed = start(words(world, out, "--load_in_4bit --merge", model=sft), world.folder)
    return sft, out, printed


def test_the_reference_of_a_run_from_an_adapter_is_base_and_adapter_before_any_update(world, quantised):
    """At step 0 the table's diagonal is the policy's own log-probs, and not the base's: pi_ref = base + SFT adapter, in 4 bits."""
    sft, out, printed = quantised
    assert adapter_base(sft) == world.policy and "training an adapter" in printed
    *_, plan, _ = train.load_plan(args := train.parse_args(words(world, "x", model=world.policy)), "all", show=False)
    (m,) = train.step_micro_batches(0, 1, len(plan.batches), args.seed)
    table = load_file(out / "tables.safetensors")["ref_logps"][m].diagonal()
    batch = train.collate([plan.examples[i] for i in plan.batches[m]], 0)
    with torch.no_grad():
        adapted, base = (sequence_logps(load_policy(str(folder), load_in_4bit=True).eval(), **batch) for folder in (sft, world.policy))
    torch.testing.assert_close(table, adapted, rtol=1e-3, atol=1e-3)
    assert (table - base).abs().max() > 0.1


def test_the_adapter_is_saved_as_peft_saves_it_and_merge_writes_a_plain_folder(world, quantised):
    """Only A and B matrices of every linear layer but the head; the merged folder needs no peft and has the adapted model's logits."""
    _, out, _ = quantised
    names = set(final_weights(out))
    assert names and all(".lora_A." in n or ".lora_B." in n for n in names) and not any("lm_head" in n for n in names)
    for linear in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert any(linear in n for n in names)
    assert not (out / "merged" / "adapter_config.json").exists()
    torch.testing.assert_close(logits_of(out / "merged"), logits_of(out), rtol=1e-4, atol=1e-4)
    assert (logits_of(out) - logits_of(world.policy)).abs().max() > 0.01


def test_weights_are_nf4_with_double_quantisation_and_the_head_stays_whole(world):
    """What the reference, the policy and the reward model are in 4 bits."""
    for model, head in ((load_policy(world.policies["llama"], load_in_4bit=True), "lm_head"), (load_reward_model(world.judge, load_in_4bit=True), "score")):
        linear = {name: m for name, m in model.named_modules() if type(m).__name__ == "Linear4bit"}
        assert linear and not any(head in name for name in linear) and getattr(model, head).weight.dtype == torch.float32
        assert all(m.weight.quant_type == "nf4" and m.weight.compress_statistics for m in linear.values())


def test_gradients_pass_through_4_bit_layers_also_after_a_look_in_eval_mode(world):
    """They point where those of the whole model point. On CPUs with AVX-512 bfloat16, bitsandbytes packs the weights in eval mode and then passes
    no gradient on, in silence; checking the head, evaluating and generating all use eval mode."""
    ids, gradients = torch.arange(5, 45)[None], []
    ones = torch.ones_like(ids)
    for in_4bit in (False, True):
        torch.manual_seed(0)  # the same adapter
        model = load_policy(world.policy, load_in_4bit=in_4bit, lora_rank=2)
        with torch.no_grad():
            sequence_logps(model.eval(), ids, ones, ones)
        sequence_logps(model.train(), ids, ones, ones).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.9
    assert gradients[1].norm().item() == pytest.approx(gradients[0].norm().item(), rel=0.1)


def test_every_program_opens_an_adapter(world, quantised, tmp_path):
    """eval.py generates from it, tables.py measures it as the reference, also in 4 bits; its fingerprint covers the base."""
    sft, out, _ = quantised
    for more in ([], ["--load_in_4bit"]):
        gen = tmp_path / f"gen{len(more)}.jsonl"
        start(["generate", "--model", str(out), "--data", world.data, "--out", str(gen), "--limit", "2", "--max_response_tokens", "5", *more], tmp_path, program=eval_package)
        assert len(gen.read_text().splitlines()) == 2
    argv = ["--model", str(out), "--reward_model", world.judge, "--data", world.data, "--batch_size", "4", "--max_response_tokens", "16", "--out"]
    for name, more in (("whole", []), ("four", ["--load_in_4bit"])):
        start([*argv, str(tmp_path / name), *more], tmp_path, program=tables)
    whole, four = (load_file(tmp_path / name)["ref_logps"] for name in ("whole", "four"))
    assert 1e-3 < (whole - four).abs().mean() < 2.0
    with safe_open(tmp_path / "four", "pt") as file:
        assert "in 4 bits" in json.loads(file.metadata()["var_tables"])["dtype"]
    before = fingerprint(str(out))
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": world.policies["llama"]}))
    assert fingerprint(str(out)) != before
    (out / "adapter_config.json").write_text(json.dumps(config))


def test_an_adapter_that_was_not_trained_changes_nothing_and_one_of_another_rank_is_refused(world, quantised):
    """B = 0: the policy starts as the reference. --lora_rank of a folder with an adapter must be its own."""
    tokenizer = load_tokenizer(world.policy)
    ids = torch.tensor([tokenizer("Where is the lamp?")["input_ids"]])
    ones = torch.ones_like(ids)
    with torch.no_grad():
        torch.testing.assert_close(sequence_logps(load_policy(world.policy, lora_rank=3), ids, ones, ones), sequence_logps(load_policy(world.policy), ids, ones, ones))
    with pytest.raises(ValueError, match="rank 2, --lora_rank is 5"):
        load_policy(str(quantised[0]), lora_rank=5)


@pytest.mark.parametrize("more, message", [("--load_in_4bit", "cannot take a gradient step; add --lora_rank"), ("--merge", "no adapter to merge"), ("--lora_rank 0", "--lora_rank must be above 0")])
def test_what_cannot_be_trained_is_refused(world, capsys, more, message):
    with pytest.raises(SystemExit, match="2"):
        train.parse_args(words(world, "x", more))
    assert message in capsys.readouterr().err


def test_a_reward_model_is_not_trained_in_4_bits(world, capsys):
    with pytest.raises(SystemExit, match="2"):
        reward.parse_args(["train", "--model", world.policy, "--data", world.data, "--output_dir", "x", "--load_in_4bit"])
    assert "--load_in_4bit" in capsys.readouterr().err
