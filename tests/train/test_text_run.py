"""Labels, tags and translations through the one training loop."""

import dataclasses
import json

import numpy as np
import pytest

from psa_jax.attention.topk import TopkConfig
from psa_jax.config import (
  AttentionConfig,
  CheckpointConfig,
  Config,
  ConfigError,
  DataConfig,
  EvalConfig,
  ModelConfig,
  NormConfig,
  OptimConfig,
  ScheduleConfig,
  TrainConfig,
)
from psa_jax.config.recipe import load_recipe
from psa_jax.data.examples import labelled, tagged
from psa_jax.data.examples import pairs as pairs_lib
from psa_jax.tasks import encoding, translation
from psa_jax.train import loop

pytestmark = pytest.mark.tier('default')

STEPS = 30
WORDS = 'red blue sun moon sea sky'.split()


SOURCES = {
  'classification': ('encoder', 'verse_genre'),
  'tagging': ('encoder', 'stdlib_tags'),
  'translation': ('encoder_decoder', 'asv_bbe'),
}


def config(task='classification', **model):
  kind, source = SOURCES[task]
  return Config(
    name='texts',
    task=task,
    data=DataConfig(
      source=source, word_dropout=0.05 if kind == 'encoder' else 0.0
    ),
    model=ModelConfig(
      kind=kind,
      num_layers=2,
      d_model=32,
      num_heads=2,
      num_kv_heads=2,
      mlp_dim=48,
      **model,
    ),
    optim=OptimConfig(learning_rate=1e-2, warmup_steps=3, b2=0.99),
    train=TrainConfig(
      steps=(STEPS,), seq_len=(24,), batch_size=(32,), label_smoothing=0.05
    ),
    eval=EvalConfig(windows=24, every=15, dense=False, beam=2),
    checkpoint=CheckpointConfig(every=15),
    log=dataclasses.replace(Config().log, every=10, tensorboard=False),
  )


def texts():
  """The label is whether the first word is red; order says nothing else."""
  rng = np.random.default_rng(0)
  pairs = []
  for i in range(240):
    words = [*rng.permutation(WORDS[2:])[:2], WORDS[i // 10 % 2]]
    text = ' '.join(words).encode()
    pairs.append((i, labelled.Labelled(text, i // 10 % 2)))
  return labelled.from_pairs(pairs, ('red', 'blue'), {'source': 'made up'})


def sentences():
  """A colour opens a span that the word after it ends."""
  rng = np.random.default_rng(0)
  found = []
  for i in range(240):
    words = [str(w) for w in rng.choice(WORDS[2:], 4)]
    at = int(rng.integers(0, 3))
    words[at] = WORDS[i % 2]
    tags = [0] * 4
    tags[at], tags[at + 1] = 1, 2
    found.append((i, tagged.Tagged(tuple(words), tuple(tags))))
  return tagged.from_sentences(
    found, ('O', 'B-x', 'I-x'), {'source': 'made up'}
  )


def pairs():
  """A translation is the text in capital letters."""
  rng = np.random.default_rng(0)
  found = []
  for i in range(240):
    text = ' '.join(rng.choice(['ab', 'cd', 'ef'], 5)).encode()
    found.append((i, pairs_lib.Pair(text, text.upper())))
  return pairs_lib.from_pairs(found, {'source': 'made up'})


def longer(cfg, steps):
  train = dataclasses.replace(cfg.train, steps=(steps,))
  every = dataclasses.replace(cfg.eval, every=0)
  return dataclasses.replace(cfg, train=train, eval=every)


CASES = {
  'labels': (config(), texts, 'macro_f1', 'majority'),
  'tags': (
    longer(config('tagging'), 70),
    sentences, 'span_f1', 'most frequent tag'
  ),
}  # fmt: skip


@pytest.mark.parametrize('name', CASES)
def test_a_run_learns_and_reports(tmp_path, capsys, name):
  cfg, data, metric, baseline = CASES[name]
  result = loop.train_and_evaluate(cfg, tmp_path, corpus=data())
  found = result['validation']['dense']
  assert found[metric] > 0.95 and result['quality'] == metric
  assert 0 <= result['baselines'][baseline] < 0.9
  assert found['windows'] == 24 and found['flops_per_window'] > 1e5
  shown = capsys.readouterr().out
  assert f'{result["baselines"][baseline]:.3f}' in shown
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert rows[0]['kind'] == 'train' and rows[0][metric] < 0.95
  # Judged again, and on the other split, with what it costs.
  test = dataclasses.replace(
    cfg, eval=dataclasses.replace(cfg.eval, split='test')
  )
  again = loop.evaluate_checkpoint(test, tmp_path, corpus=data())
  assert again['split'] == 'test' and again['validation']['dense'][metric] > 0.9
  shown = capsys.readouterr().out
  for word in (
    'FLOPs per window',
    'seconds per window',
    'peak memory',
    'density',
  ):
    assert word in shown


def test_translation_learns_writes_and_goes_on(tmp_path, capsys):
  cfg = longer(config('translation'), 80)
  result = loop.train_and_evaluate(cfg, tmp_path / 'whole', corpus=pairs())
  found = result['validation']['dense']
  assert found['bleu'] > 50 > result['baselines']['copied source']
  source, target, guess = found['samples'][0]
  assert target == source.upper() and guess.isupper()
  shown = capsys.readouterr().out
  assert 'tok:13a' in shown and 'seconds per translation' not in shown
  # The greedy translation of the same checkpoint, and with what it costs.
  greedy = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, beam=1))
  again = loop.evaluate_checkpoint(greedy, tmp_path / 'whole', corpus=pairs())
  assert again['validation']['dense']['bleu'] > 40
  assert again['validation']['dense']['loss'] == found['loss']
  assert 'seconds per translation' in capsys.readouterr().out


def test_a_run_in_two_parts_is_a_run(tmp_path):
  def cut(steps):
    cfg = config()
    return dataclasses.replace(
      cfg,
      train=dataclasses.replace(cfg.train, steps=(steps,)),
      optim=dataclasses.replace(cfg.optim, decay_steps=6),
      eval=dataclasses.replace(cfg.eval, every=0),
      checkpoint=CheckpointConfig(every=0),
    )

  whole = loop.train_and_evaluate(cut(6), tmp_path / 'whole', corpus=texts())
  loop.train_and_evaluate(cut(3), tmp_path / 'parts', corpus=texts())
  parts = loop.train_and_evaluate(cut(6), tmp_path / 'parts', corpus=texts())
  a, b = (x['validation']['dense']['loss'] for x in (whole, parts))
  assert a == b


@pytest.mark.parametrize('name', ['topk', 'cascade'])
def test_sparse_encoders_train(tmp_path, name):
  topk = TopkConfig(keep=ScheduleConfig('constant', init=0.5))
  cfg = config(attention=AttentionConfig(name=name, topk=topk))
  cfg = dataclasses.replace(
    cfg, train=dataclasses.replace(cfg.train, steps=(4,))
  )
  found = loop.train_and_evaluate(cfg, tmp_path, corpus=texts())
  found = found['validation'][name]
  assert found['density'] < 0.8 and np.isfinite(found['loss'])
  if name == 'cascade':
    assert found['kept_tokens'] < 0.8


def test_an_encoder_exports_without_norms(tmp_path):
  norm = NormConfig('prepbn', decay_steps=4, scale_init=1.0, eta_init=0.5)
  cfg = config(norm=norm)
  cfg = dataclasses.replace(
    cfg, train=dataclasses.replace(cfg.train, steps=(8,))
  )
  want = loop.train_and_evaluate(cfg, tmp_path, corpus=texts())
  target = loop.export_checkpoint(cfg, tmp_path, corpus=texts())
  folded = load_recipe(str(target / 'config.json'))
  assert folded.model.norm.kind == 'none'
  got = loop.evaluate_checkpoint(folded, target, corpus=texts())
  want, got = (x['validation']['dense']['loss'] for x in (want, got))
  assert got == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize(
  ('task', 'data'),
  [
    ('classification', texts),
    ('tagging', sentences),
    ('translation', pairs),
  ],
)
def test_a_split_that_is_not_there_is_refused_at_once(
  tmp_path, monkeypatch, task, data
):
  def never(*args):
    raise AssertionError('a tokenizer was trained')

  for module in (encoding, translation):
    monkeypatch.setattr(module, 'make_tokenizer', never)
  found = data()
  examples = dataclasses.replace(found.examples, test=None)
  cfg = config(task)
  cfg = dataclasses.replace(
    cfg, eval=dataclasses.replace(cfg.eval, split='test')
  )
  with pytest.raises(ConfigError, match='no test split; set eval.split'):
    loop.train_and_evaluate(
      cfg, tmp_path, corpus=found._replace(examples=examples)
    )


def test_a_vocabulary_that_is_too_small_is_refused(tmp_path):
  cfg = config(vocab_size=17)
  with pytest.raises(ConfigError, match='17 is below the 256'):
    loop.train_and_evaluate(cfg, tmp_path, corpus=texts())
