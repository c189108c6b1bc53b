def backward(spec, interpret, saved, grads):
  raise NotImplementedError
