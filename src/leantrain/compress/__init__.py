"""Making a trained network smaller."""

from __future__ import annotations

from leantrain.compress.welore import LayerPlan, WeLorePlan, freeze_all_but_factors, plan_welore, welore

__all__ = ["LayerPlan", "WeLorePlan", "freeze_all_but_factors", "plan_welore", "welore"]
