"""A model in eval mode for a while."""

import torch

from larpo.modeling.eval_mode import in_eval_mode


class Told(torch.nn.Linear):
    """Does something of its own whenever its mode changes, as layers that merge an adapter do."""

    def train(self, mode=True):
        self.told = [*getattr(self, "told", []), mode]
        return super().train(mode)


def test_every_module_is_afterwards_in_its_own_mode_and_was_told():
    model = torch.nn.Sequential(Told(2, 2), torch.nn.Dropout(), torch.nn.Dropout()).train()
    model[2].eval()
    with in_eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, True, False]
    assert model[0].told == [True, False, True]
