srun --nodes={{ options.nodes }} --ntasks-per-node=1 --cpus-per-task={{ options.cpus }} --kill-on-bad-exit=0 --wait=120
{#- wait: seconds for the other tasks of a step once one has ended -#}
{%- if image and cluster.container.kind.value == "pyxis" %} --container-image={{ image | quote }} --container-mounts="$PWD:$PWD,$jobs:$jobs,${jobs%/jobs/*}:${jobs%/jobs/*}
{%- for path in mounted %},{{ path | literal }}:{{ path | literal }}{% endfor %}
{%- for mount in cluster.container.mounts %},{{ mount | variables }}{% endfor %}" --container-workdir="$PWD"
{%- endif %}
{%- for option in cluster.srun %} {{ option | quote }}{% endfor %} \
  {% if image and cluster.container.kind.value == "apptainer" %}apptainer exec{{ " --nv" if options.gpus }} --bind "$PWD" --bind "${jobs%/jobs/*}"
{%- for path in mounted %} --bind "{{ path | literal }}"{% endfor %}
{%- for mount in cluster.container.mounts %} --bind "{{ mount | variables }}"{% endfor %} --pwd "$PWD" {{ image | quote }} \
  {% endif %}