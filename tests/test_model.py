"""The fused model's forward: every value against each specialist's own forward on its own unpadded text."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel, Trainer, TrainingArguments

from helpers import VOCAB_SIZE, make_fused, make_mixed, make_model, make_tokenizer, make_trio, reference_scores
from ultrafuser.alignment.collate import Batch, collate
from ultrafuser.alignment.encode import Encoder
from ultrafuser.chat.messages import Conversation, Message
from ultrafuser.errors import ConfigError, ModelError
from ultrafuser.model.backbone import check_backbone, head_logits, last_hidden_state
from ultrafuser.model.build import read_templates
from ultrafuser.model.fused import FusedForCausalLM

SINGLE = (Message("user", "2+2?"), Message("assistant", "4."))
MULTI = (
    Message("system", "Be brief."),
    Message("user", "hi"),
    Message("assistant", "Hello."),
    Message("user", "2+2?"),
    Message("assistant", "It is 4."),
)
KINDS = ("llama", "qwen2", "gpt_neox", "gpt2", "opt", "gemma2", "mistral", "bloom")


def make_batch(model: FusedForCausalLM, *conversations: Conversation) -> Batch:
    encoder = Encoder(make_tokenizer(), read_templates(model.config))
    records = [encoder.encode(c, id=str(i), domain="text") for i, c in enumerate(conversations)]
    return collate(records, pad_id=encoder.pad_id)


def predicting_columns(labels: Tensor) -> Tensor:
    return torch.cat([labels[:, 1:] != -100, torch.zeros(len(labels), 1, dtype=torch.bool)], dim=1)


def reference_rows(model: FusedForCausalLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """Fused logits [M, V] and gate scores [M, N] of the columns that predict, from each one's visible tokens alone."""
    logits, hiddens = [], []
    for j, specialist in enumerate(model.specialists.values()):
        own_logits, own_hiddens = [], []
        for b, predicting in enumerate(predicting_columns(batch.labels)):
            visible = batch.specialist_attention_mask[b, j].bool()
            output = specialist(
                input_ids=batch.specialist_input_ids[b, j][visible][None], use_cache=False, output_hidden_states=True
            )
            wanted = (visible.cumsum(dim=0) - 1)[predicting]
            own_logits.append(output.logits[0, wanted])
            own_hiddens.append(output.hidden_states[-1][0, wanted])
        logits.append(torch.cat(own_logits))
        hiddens.append(torch.cat(own_hiddens))
    scores = reference_scores(model, hiddens)
    weights = scores.softmax(dim=-1)
    return sum(weights[:, j, None] * logits[j] for j in range(len(logits))), scores


def assert_near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("specialists", [make_trio, make_mixed])
@pytest.mark.parametrize("conversations", [(SINGLE,), (MULTI,), (MULTI, SINGLE)], ids=["single", "multi", "both"])
def test_what_is_fused_is_what_each_specialist_says_about_its_own_unpadded_text(specialists, conversations):
    """Padding between turns, on the left of short prompts and on the right of short rows changes nothing."""
    model = make_fused(specialists())
    batch = make_batch(model, *conversations)

    output = model(**batch.tensors())

    logits, scores = reference_rows(model, batch)
    predicting = predicting_columns(batch.labels)
    assert_near(output.logits[predicting], logits)
    assert_near(output.gate_weights[predicting], scores.softmax(dim=-1))
    labels = batch.labels[batch.labels != -100]
    assert_near(output.loss, F.cross_entropy(logits, labels))


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "bloom", "gpt2", "opt"])
def test_padding_between_turns_changes_nothing_for_other_kinds_of_attention(kind: str):
    """A sliding window and ALiBi count columns, so padding in the middle would be counted too."""
    window = {"sliding_window": 8} if kind in ("mistral", "gemma2") else {}
    model = make_fused({"text": make_model("llama"), "code": make_model(kind, seed=1, **window)})
    batch = make_batch(model, MULTI, SINGLE)

    output = model(**batch.tensors())

    assert_near(output.logits[predicting_columns(batch.labels)], reference_rows(model, batch)[0])


def test_left_and_right_padded_rows_give_the_values_of_unpadded_rows():
    model = make_fused(make_mixed(), templates=None)
    rows = [torch.randint(5, VOCAB_SIZE, (n,)) for n in (4, 9)]
    alone = [model(input_ids=row[None]) for row in rows]

    for side in ("left", "right"):
        short = F.pad(rows[0], (5, 0) if side == "left" else (0, 5))
        mask = torch.ones(2, 9, dtype=torch.long)
        mask[0, slice(0, 5) if side == "left" else slice(4, 9)] = 0
        both = model(input_ids=torch.stack([short, rows[1]]), attention_mask=mask)
        for row, single in enumerate(alone):
            assert_near(both.logits[row][mask[row] == 1], single.logits[0])
            assert_near(both.gate_weights[row][mask[row] == 1], single.gate_weights[0])


def test_a_batch_equals_its_rows():
    model = make_fused()
    both = model(**make_batch(model, MULTI, SINGLE).tensors())
    losses, tokens = [], []
    for conversation in (MULTI, SINGLE):
        batch = make_batch(model, conversation)
        losses.append(model(**batch.tensors()).loss)
        tokens.append(batch.num_response_tokens)

    assert_near(both.loss, sum(a * n for a, n in zip(losses, tokens, strict=True)) / sum(tokens))


@pytest.mark.parametrize("training", [False, True])
def test_texts_that_positions_pack_into_one_row_do_not_see_each_other(training: bool):
    """A specialist asked for a cache, which is the default outside training, would read across the border."""
    model = make_fused(templates=None).train(training)
    first, second = torch.randint(5, VOCAB_SIZE, (1, 5)), torch.randint(5, VOCAB_SIZE, (1, 4))
    positions = torch.tensor([[*range(5), *range(4)]])

    packed = model(input_ids=torch.cat([first, second], dim=1), position_ids=positions)

    apart = [model(input_ids=ids) for ids in (first, second)]
    assert_near(packed.logits, torch.cat([output.logits for output in apart], dim=1))
    assert_near(packed.gate_weights, torch.cat([output.gate_weights for output in apart], dim=1))


@pytest.mark.parametrize("chunk", [1, 3])
def test_the_size_of_loss_chunks_changes_neither_loss_nor_gradients(chunk: int):
    model = make_fused(make_mixed())
    batch = make_batch(model, MULTI, SINGLE).tensors()

    def run(size: int) -> tuple[Tensor, list[Tensor]]:
        model.loss_chunk = size
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    loss, gradients = run(1024)
    again, others = run(chunk)
    assert_near(again, loss)
    assert len(gradients) == len(list(model.parameters()))
    for a, b in zip(gradients, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_the_gradient_is_that_of_the_obvious_loss():
    model = make_fused()
    batch = make_batch(model, MULTI)
    model(**batch.tensors()).loss.backward()
    actual = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    logits, _ = reference_rows(model, batch)
    F.cross_entropy(logits, batch.labels[batch.labels != -100]).backward()

    for a, p in zip(actual, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-3, atol=1e-5)


def test_activation_checkpointing_changes_nothing():
    model = make_fused().train()
    batch = make_batch(model, MULTI).tensors()
    plain = model(**batch).loss
    plain.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    model.gradient_checkpointing_enable()
    again = model(**batch).loss
    again.backward()

    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert_near(again, plain)
    for a, p in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-3, atol=1e-5)


def test_logits_are_left_out_in_training_unless_asked_for():
    model = make_fused()
    batch = make_batch(model, SINGLE).tensors()

    assert model(**batch).logits is not None
    assert model(**batch, skip_logits=True).logits is None
    model.train()
    assert model(**batch).logits is None
    assert model(**batch, skip_logits=False).logits.shape == (1, batch["labels"].shape[1], VOCAB_SIZE)
    del batch["labels"]
    assert model(**batch).logits is not None


def test_only_the_last_logits_are_made_when_only_those_are_kept():
    model = make_fused()
    batch = make_batch(model, SINGLE).tensors()

    whole, last = model(**batch).logits, model(**batch, logits_to_keep=2).logits

    assert_near(last, whole[:, -2:])


def test_the_loss_is_divided_by_the_items_of_the_whole_batch_where_these_are_given():
    model = make_fused()
    batch = make_batch(model, MULTI)
    mean = model(**batch.tensors()).loss

    loss = model(**batch.tensors(), num_items_in_batch=100).loss

    assert_near(loss, mean * batch.num_response_tokens / 100)


@pytest.mark.parametrize("options", [{}, {"granularity": "prompt"}, {"weighting": "perplexity"}, {"solo": "code"}])
@pytest.mark.parametrize("space", ["logits", "probs"])
def test_response_nll_equals_forward(options: dict[str, str], space: str):
    model = make_fused(fusion_space=space, **options)
    batch = make_batch(model, MULTI, SINGLE)

    nll, weights, predicting = model.response_nll(**batch.tensors())

    output = model(**batch.tensors())
    labels = batch.labels[batch.labels != -100]
    assert torch.equal(predicting, predicting_columns(batch.labels))
    assert_near(nll, F.cross_entropy(output.logits[predicting], labels, reduction="none"))
    assert_near(nll.mean(), output.loss)
    assert_near(weights, output.gate_weights[predicting])


def test_granularity_prompt_holds_the_last_prompt_tokens_weights_through_each_response():
    model = make_fused(granularity="prompt")
    batch = make_batch(model, MULTI)

    output = model(**batch.tensors())

    _, scores = reference_rows(model, batch)
    lengths = [len(turn.response) for turn in batch.rows[0].turns]
    held = torch.cat([rows[:1].expand_as(rows) for rows in scores.softmax(dim=-1).split(lengths)])
    assert_near(output.gate_weights[predicting_columns(batch.labels)], held)
    assert not torch.allclose(scores[0], scores[1])


@pytest.mark.parametrize("weighting", ["gate", "perplexity"])
def test_held_weights_are_the_same_with_and_without_a_cache(weighting: str):
    model = make_fused(templates=None, granularity="prompt", weighting=weighting)
    ids = torch.randint(5, VOCAB_SIZE, (2, 9))
    whole = model(input_ids=ids, prompt_length=5)

    first = model(input_ids=ids[:, :5], use_cache=True, prompt_length=5)
    steps = [
        model(input_ids=ids[:, t : t + 1], past_key_values=first.past_key_values, use_cache=True).gate_weights
        for t in range(5, 9)
    ]

    assert_near(torch.cat([first.gate_weights, *steps], dim=1), whole.gate_weights)
    assert torch.equal(whole.gate_weights[:, 4:], whole.gate_weights[:, 4:5].expand(-1, 5, -1))


def test_perplexity_weights_are_those_of_each_specialist_on_its_own_prompt():
    model = make_fused(weighting="perplexity", perplexity_temperature=0.5)
    batch = make_batch(model, MULTI)

    weights = model(**batch.tensors()).gate_weights

    first = int(predicting_columns(batch.labels)[0].nonzero()[0])  # the last column of the first prompt
    inverse = []
    for j, specialist in enumerate(model.specialists.values()):
        visible = batch.specialist_attention_mask[0, j].bool()
        visible[first + 1 :] = False
        ids = batch.specialist_input_ids[0, j][visible]
        mean = F.cross_entropy(specialist(input_ids=ids[None]).logits[0, :-1], ids[1:])
        inverse.append(math.exp(-mean.item() / 0.5))
    assert_near(weights[0, first], torch.tensor(inverse) / sum(inverse))
    assert_near(weights[0, first + 1], weights[0, first])


def test_perplexity_weights_see_over_padding_between_turns():
    model = make_fused(weighting="perplexity")
    batch = make_batch(model, MULTI)

    weights = model(**batch.tensors()).gate_weights

    last = int(predicting_columns(batch.labels)[0].nonzero()[-1])
    start = last - len(batch.rows[0].turns[-1].response) + 1  # the last column of the second prompt
    scores = []
    for j, specialist in enumerate(model.specialists.values()):
        visible = batch.specialist_attention_mask[0, j].bool()
        visible[start + 1 :] = False
        ids = batch.specialist_input_ids[0, j][visible]
        scores.append(-F.cross_entropy(specialist(input_ids=ids[None]).logits[0, :-1], ids[1:]))
    assert_near(weights[0, last], torch.stack(scores).softmax(dim=0))


def test_uniform_weights_need_no_gate():
    model = make_fused(weighting="uniform", templates=None)
    ids = torch.randint(5, VOCAB_SIZE, (1, 6))

    output = model(input_ids=ids)

    mean = sum(specialist(input_ids=ids).logits for specialist in model.specialists.values()) / 3
    assert_near(output.logits, mean)


def test_solo_is_that_specialist_alone_and_runs_no_other():
    model = make_fused(make_mixed(), templates=None, solo="code")
    ids = torch.randint(5, VOCAB_SIZE, (2, 6))
    model.specialists["text"].forward = model.specialists["math"].forward = None

    output = model(input_ids=ids)

    assert_near(output.logits, model.specialists["code"](input_ids=ids).logits)
    assert torch.equal(output.gate_weights[0, 0], torch.tensor([0.0, 1.0, 0.0]))
    assert_near(model(input_ids=ids, labels=ids).loss, model.specialists["code"](input_ids=ids, labels=ids).loss)


def test_one_specialist_passes_through_unchanged():
    specialist = make_model(tied=True)
    model = make_fused({"text": specialist}, templates=None)
    ids = torch.randint(5, VOCAB_SIZE, (2, 6))

    output = model(input_ids=ids, labels=ids)

    expected = specialist(input_ids=ids, labels=ids)
    assert_near(output.logits, expected.logits)
    assert_near(output.loss, expected.loss)


@pytest.mark.parametrize("kind", KINDS)
def test_backbone_and_head_give_the_models_own_logits(kind: str):
    specialist = make_model(kind)
    ids = torch.randint(5, VOCAB_SIZE, (1, 6))
    positions = torch.arange(6)[None]

    check_backbone(specialist, "text")
    logits = head_logits(specialist, last_hidden_state(specialist, ids, position_ids=positions))

    assert_near(logits, specialist(input_ids=ids).logits)


def test_gemmas_soft_capping_is_kept():
    specialist = make_model("gemma2", final_logit_softcapping=2.0)
    model = make_fused({"text": specialist, "code": make_model(seed=1)}, templates=None, solo="text")
    ids = torch.randint(5, VOCAB_SIZE, (1, 6))

    logits = model(input_ids=ids).logits

    assert logits.abs().max() <= 2.0
    assert_near(logits, specialist(input_ids=ids).logits)


def test_a_projected_last_hidden_state_sets_the_gates_input_size():
    """OPT-350m alone among the common models has a head narrower than its layers."""
    specialist = make_model("opt", word_embed_proj_dim=8, do_layer_norm_before=True)

    model = make_fused({"text": make_model(), "code": specialist}, templates=None)

    assert model.config.hidden_sizes == [16, 8]
    assert model(input_ids=torch.tensor([[5, 6]])).gate_weights.shape == (1, 2, 2)


def test_a_model_whose_logits_are_not_its_heads_is_refused():
    class Doubled(type(make_model())):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 2 * output.logits
            return output

    strange = make_model()
    strange.__class__ = Doubled

    with pytest.raises(ModelError, match="'code' is a Doubled, whose logits are not those of its head"):
        make_fused({"text": make_model(), "code": strange})


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ModelError, match="no causal LM"):
        check_backbone(make_model().model, "text")


@pytest.mark.parametrize("name", ["Text", "a.b", "1st", ""])
def test_names_that_cannot_be_used_are_refused(name: str):
    with pytest.raises(ConfigError, match="specialist name"):
        make_fused({name: make_model()})


def test_unknown_options_are_refused():
    with pytest.raises(ConfigError, match="fusion_space is 'product'; choose one of logits, logprobs, probs"):
        make_fused(fusion_space="product")
    with pytest.raises(ConfigError, match="solo is 'poetry'"):
        make_fused(solo="poetry")


def test_the_gate_is_the_same_for_the_same_seed_and_leaves_the_global_random_state_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    specialists = make_trio()
    first, second, third = (make_fused(specialists, seed=seed) for seed in (3, 3, 4))

    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.fusion_gate.layers[0].weight, second.fusion_gate.layers[0].weight)
    assert not torch.equal(first.fusion_gate.layers[0].weight, third.fusion_gate.layers[0].weight)


def test_a_bf16_model_keeps_its_gate_in_fp32():
    model = make_fused(make_mixed(), templates=None).to(torch.bfloat16)

    output = model(input_ids=torch.randint(5, VOCAB_SIZE, (1, 6)))

    assert {p.dtype for p in model.specialists.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.fusion_gate.parameters()} == {torch.float32}
    assert output.gate_weights.dtype == output.logits.dtype == torch.float32


def test_two_forwards_with_a_cache_equal_one_without():
    model = make_fused(make_mixed(), templates=None)
    ids = torch.randint(5, VOCAB_SIZE, (2, 9))
    whole = model(input_ids=ids)

    first = model(input_ids=ids[:, :6], use_cache=True)
    second = model(input_ids=ids[:, 6:], past_key_values=first.past_key_values)

    assert_near(torch.cat([first.logits, second.logits], dim=1), whole.logits)
    assert_near(torch.cat([first.gate_weights, second.gate_weights], dim=1), whole.gate_weights)


def test_perplexity_weights_refuse_a_prompt_in_pieces():
    model = make_fused(templates=None, weighting="perplexity")
    ids = torch.randint(5, VOCAB_SIZE, (1, 6))
    first = model(input_ids=ids[:, :3], use_cache=True)

    with pytest.raises(ModelError, match="whole prompt in one forward"):
        model(input_ids=ids[:, 3:], past_key_values=first.past_key_values)


def test_forward_says_what_it_lacks():
    model = make_fused()

    with pytest.raises(ModelError, match="needs input_ids, or specialist_input_ids"):
        model()
    with pytest.raises(ModelError, match="past_key_values is a DynamicCache"):
        model(input_ids=torch.tensor([[5]]), past_key_values=DynamicCache())


class Records(torch.utils.data.Dataset):
    def __init__(self, batch: Batch) -> None:
        self.rows = [{key: value[i] for key, value in batch.tensors().items()} for i in range(len(batch.rows))]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


def test_it_trains_under_transformers_own_trainer(tmp_path):
    model = make_fused(make_mixed())
    batch = make_batch(model, SINGLE, MULTI)
    before = model(**batch.tensors()).loss
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
    )

    trainer = Trainer(model=model, args=arguments, train_dataset=Records(batch))
    trainer.train()

    model.eval()
    assert_near(torch.tensor(trainer.state.log_history[0]["loss"]), before.detach())
    assert model(**batch.tensors()).loss < before - 0.1


def test_parameters_that_are_trained_are_the_specialists_and_the_gate():
    specialists: dict[str, PreTrainedModel] = make_mixed()
    model = make_fused(specialists)

    names: Sequence[str] = sorted({name.split(".")[0] for name, _ in model.named_parameters()})

    assert names == ["fusion_gate", "specialists"]
    assert model.specialists["text"] is specialists["text"]
    assert all(not parameter.is_meta for parameter in model.parameters())
