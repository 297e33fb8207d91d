from torch_mdgd.integrations.swift import register

register(rule="MDGD(3.0, regularize=0)")
