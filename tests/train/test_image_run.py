"""Pictures through the one training loop; folding, export, evaluation."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from psa_jax import config as config_lib
from psa_jax import sharding
from psa_jax.config import (
  AttentionConfig,
  AugmentConfig,
  CheckpointConfig,
  Config,
  ConfigError,
  ControllerConfig,
  DataConfig,
  EvalConfig,
  ImageConfig,
  ModelConfig,
  NormConfig,
  OptimConfig,
  RunError,
  TrainConfig,
)
from psa_jax.config.recipe import default_workdir, load_recipe
from psa_jax.data.images import sets
from psa_jax.tasks import make_task
from psa_jax.train import export, loop, recalibrate
from psa_jax.train import stages as stages_lib
from psa_jax.train import state as state_lib
from psa_jax.train.checkpoint import Checkpoints
from psa_jax.train.state import TrainState

pytestmark = pytest.mark.tier('default')

STEPS = 6


def config(**changes):
  norm = NormConfig(
    'prepbn', base='layernorm', decay_steps=4, scale_init=1.0, eta_init=1.0
  )
  found = Config(
    name='pictures',
    task='image_classification',
    data=DataConfig(source='digits', shift=1),
    model=ModelConfig(
      kind='vit',
      num_layers=2,
      d_model=16,
      num_heads=4,
      num_kv_heads=4,
      mlp_dim=24,
      mlp='gelu',
      biases=True,
      image=ImageConfig(size=8, channels=1, patch=4),
      norm=norm,
    ),
    optim=OptimConfig(learning_rate=1e-2, warmup_steps=2),
    train=TrainConfig(
      steps=(STEPS,), seq_len=(4,), batch_size=(8,), label_smoothing=0.1
    ),
    eval=EvalConfig(windows=20, every=3),
    checkpoint=CheckpointConfig(every=3),
  )
  return dataclasses.replace(found, **changes)


def pictures():
  """Two classes that differ in brightness."""
  rng = np.random.default_rng(0)
  labels = np.arange(120) % 2
  pixels = (
    rng.integers(0, 100, (120, 8, 8, 1)) + 120 * labels[:, None, None, None]
  )
  return sets.from_arrays(
    pixels.astype(np.uint8), labels, manifest={'source': 'made up'}
  )


def run(folder, cfg=None, **settings):
  return loop.train_and_evaluate(
    cfg or config(), folder, corpus=pictures(), **settings
  )


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A finished run and its result, for all tests that need one."""
  folder = tmp_path_factory.mktemp('runs') / 'whole'
  return folder, run(folder)


@pytest.fixture
def trained(whole, tmp_path):
  """A copy of the finished run that a test may write into."""
  return shutil.copytree(whole[0], tmp_path / 'trained')


def metrics(folder):
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_a_run_learns_reports_and_goes_on(whole, tmp_path):
  folder, result = whole
  found = result['validation']['dense']
  assert found['accuracy'] > 0.9 > 0.6 > result['baselines']['majority']
  assert found['items'] == found['windows'] == 12
  rows = metrics(folder)
  assert rows[0]['gamma'] == 1 and rows[0]['accuracy'] <= 1
  # Stopped half-way and started again: the same numbers, bit for bit.
  half = dataclasses.replace(
    config(), train=dataclasses.replace(config().train, steps=(3,))
  )
  half = dataclasses.replace(
    half, optim=dataclasses.replace(half.optim, decay_steps=STEPS)
  )
  full = dataclasses.replace(
    config(), optim=dataclasses.replace(config().optim, decay_steps=STEPS)
  )
  run(tmp_path / 'parts', half)
  again = run(tmp_path / 'parts', full)
  assert again['validation']['dense']['loss'] == found['loss']


def test_the_exported_model_is_the_folded_one(trained):
  target = loop.export_checkpoint(config(), trained, corpus=pictures())
  spec = str(target / 'config.json')
  cfg = load_recipe(spec, [('eval.windows', '24')])
  assert default_workdir(spec) == target
  assert cfg.model.norm.kind == 'none' and cfg.eval.windows == 24
  kept = dataclasses.replace(config(), eval=cfg.eval)
  want = loop.evaluate_checkpoint(kept, trained, corpus=pictures())
  got = loop.evaluate_checkpoint(cfg, target, corpus=pictures())
  assert got['step'] == want['step'] == STEPS
  want, got = (x['validation']['dense'] for x in (want, got))
  assert got['accuracy'] == want['accuracy']
  assert got['loss'] == pytest.approx(want['loss'], abs=1e-5)
  names = load_file(target / 'model.safetensors')
  assert not any('norm' in name or 'var' in name for name in names)


def test_statistics_anew_are_those_of_the_batches_together(tmp_path):
  """Four batches of 8 are one of 32, up to n - 1 in place of n of each."""
  still = config(data=DataConfig(source='digits'))
  run(tmp_path, still)
  mesh = sharding.make_mesh(still.mesh)
  task = make_task(still, pictures(), mesh)
  program = state_lib.make_program(still, task.vocab_size, mesh)
  checkpoints = Checkpoints(tmp_path / 'checkpoints', read_only=True)
  # Of one norm with nothing in front of it: the others see their own batch.
  name = 'attention_norm'
  with jax.set_mesh(mesh):
    found = checkpoints.restore_latest(program.abstract)
    assert found is not None
    stage = stages_lib.plan(still)[-1]
    batches = task.train_iterator(stage)
    got = recalibrate.recalibrate(
      still, task, program, found.state, batches, count=4
    )
    again = task.train_iterator(stage)
    rows = [next(again) for _ in range(4)]
    x = jnp.asarray(np.concatenate([row['images'] for row in rows]))
    model = program.merge(found.state.params, found.state.model_state)
    x = np.asarray(model.embed(pictures().normalize(x)), np.float64)
  stats = got.model_state['layers'][name]
  x = x.reshape(4, -1, x.shape[-1])
  mean = x.mean((0, 1))
  np.testing.assert_allclose(stats['mean'][0], mean, atol=1e-5)
  want = (x.var(1, ddof=1) + x.mean(1) ** 2).mean(0) - mean**2
  np.testing.assert_allclose(stats['var'][0], want, rtol=1e-4)
  ratio, n = want / x.var((0, 1)), x.shape[1]
  assert (ratio >= 1).all() and (ratio <= n / (n - 1) + 1e-9).all()
  old = found.state.model_state['layers'][name]
  assert np.abs(stats['mean'] - old['mean']).max() > 1e-3
  for part in ('params', 'step'):
    same = jax.tree.map(
      lambda a, b: bool((a == b).all()),
      getattr(got, part),
      getattr(found.state, part),
    )
    assert jax.tree.all(same)


def test_recalibration_in_evaluation_and_export(trained):
  new = config(eval=EvalConfig(windows=12, recalibrate_bn=3))
  found = loop.evaluate_checkpoint(new, trained, corpus=pictures())
  target = loop.export_checkpoint(new, trained, corpus=pictures())
  cfg = load_recipe(str(target / 'config.json'))
  folded = loop.evaluate_checkpoint(cfg, target, corpus=pictures())
  old = loop.evaluate_checkpoint(
    config(eval=EvalConfig(windows=12)), trained, corpus=pictures()
  )
  new, folded, old = (
    x['validation']['dense']['loss'] for x in (found, folded, old)
  )
  assert new == pytest.approx(folded, abs=1e-5)
  assert abs(new - old) > 1e-4


def test_recalibration_is_without_what_training_leaves_out(tmp_path):
  model = dataclasses.replace(config().model, dropout=0.5, drop_path=0.5)
  mixing = AugmentConfig(mixup=0.8, cutmix=1.0)
  data = dataclasses.replace(config().data, augment=mixing)
  cfg = config(model=model, data=data)
  run(tmp_path, cfg)
  new = EvalConfig(windows=12, recalibrate_bn=3)
  plain = config(eval=new)
  found, want = (
    loop.evaluate_checkpoint(
      dataclasses.replace(x, eval=new), tmp_path, corpus=pictures()
    )['validation']['dense']['loss']
    for x in (cfg, plain)
  )
  assert found == want
  old = dataclasses.replace(cfg, eval=EvalConfig(windows=12))
  old = loop.evaluate_checkpoint(old, tmp_path, corpus=pictures())
  assert abs(found - old['validation']['dense']['loss']) > 1e-4


def test_word_dropout_is_off_in_recalibration():
  cfg = config(data=DataConfig(source='verse_genre', word_dropout=0.3))
  assert recalibrate.still(cfg).data.word_dropout == 0


def test_without_statistics_there_is_nothing_to_estimate(tmp_path):
  model = dataclasses.replace(config().model, norm=NormConfig('layernorm'))
  cfg = config(model=model)
  run(tmp_path, cfg)
  new = dataclasses.replace(cfg, eval=EvalConfig(windows=12, recalibrate_bn=3))
  with pytest.raises(ConfigError, match='nothing to estimate.*set it to 0'):
    loop.evaluate_checkpoint(new, tmp_path, corpus=pictures())


def test_exports_of_another_model_are_refused(trained):
  target = loop.export_checkpoint(config(), trained, corpus=pictures())
  cfg = load_recipe(str(target / 'config.json'))
  path = target / 'model.safetensors'
  arrays = load_file(path)

  def write(arrays):
    save_file(arrays, path, metadata=export._metadata(6, arrays))

  def check(error, words):
    with pytest.raises(error, match=words):
      loop.evaluate_checkpoint(cfg, target, corpus=pictures())

  first = min(arrays)
  write({**arrays, 'params/more': arrays[first]})
  check(ConfigError, 'also holds params/more')
  less = {k: v for k, v in arrays.items() if k != first}
  write(less)
  check(ConfigError, f'{first} is float32.*, the file has none')
  write({**arrays, first: arrays[first][:1]})
  check(ConfigError, r'the file has float32\[1')
  save_file(arrays, path)
  check(RunError, 'cannot read .*export the model again')
  path.write_bytes(b'no tensors')
  check(RunError, 'cannot read .*export the model again')


def test_what_does_not_export_says_why(tmp_path):
  with pytest.raises(RunError, match='no checkpoint'):
    loop.export_checkpoint(config(), tmp_path, corpus=pictures())
  early = dataclasses.replace(
    config(), train=dataclasses.replace(config().train, steps=(3,))
  )
  run(tmp_path, early)
  with pytest.raises(ConfigError, match='at step 3 PRepBN is still 25%'):
    loop.export_checkpoint(early, tmp_path, corpus=pictures())
  rules = dataclasses.replace(early.train, controller=ControllerConfig('loss'))
  psa = dataclasses.replace(
    early.model, kind='decoder_lm', attention=AttentionConfig('psa')
  )
  controlled = dataclasses.replace(early, model=psa, train=rules)
  with pytest.raises(ConfigError, match='controller sets the budget'):
    export.save(tmp_path, controlled, TrainState(3, {}, {}, (), 0))
  assert not (tmp_path / 'export').exists()


def test_pictures_that_do_not_fit_the_model(tmp_path):
  model = config().model
  wide = dataclasses.replace(model, image=ImageConfig(16, 1, 4))
  with pytest.raises(ConfigError, match='are 8 x 8 with 1 channels; set'):
    run(tmp_path, config(model=wide))
  fine = dataclasses.replace(model, image=ImageConfig(8, 1, 2))
  with pytest.raises(ConfigError, match='are 16 tokens; set train.seq_len'):
    run(tmp_path, config(model=fine))


def test_a_resolved_configuration_is_a_recipe(tmp_path):
  path = tmp_path / 'config.json'
  with pytest.raises(ConfigError, match='there is no configuration'):
    load_recipe(str(path))
  path.write_text(json.dumps(config_lib.to_dict(config())))
  assert load_recipe(str(path)) == config()
  with pytest.raises(ConfigError, match='takes no argument :quick'):
    load_recipe(f'{path}:quick')
  path.write_text('[1]')
  with pytest.raises(ConfigError, match='is no JSON object'):
    load_recipe(str(path))
  path.write_text('{')
  with pytest.raises(ConfigError, match='cannot read the configuration'):
    load_recipe(str(path))


def test_attention_arms_train(tmp_path):
  model = dataclasses.replace(config().model, attention=AttentionConfig('sla'))
  short = dataclasses.replace(config().train, steps=(2,))
  cfg = config(model=model, train=short, optim=OptimConfig(warmup_steps=1))
  result = run(tmp_path, dataclasses.replace(cfg, eval=EvalConfig(windows=8)))
  assert np.isfinite(result['validation']['sla']['loss'])
