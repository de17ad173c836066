"""Chat templates of the kinds that fine-tunes use, written for the tests."""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
HEADERS = (  # in the manner of Llama 3
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|im_start|>' ~ message['role'] ~ '<|im_end|>\n\n' ~ message['content'] "
    "| trim ~ eos_token %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant<|im_end|>\n\n' }}{% endif %}"
)
LLAMA = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system != false %}"
    "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
INST = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
VICUNA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{{ '\n\n' }}"
    "{% elif m.role == 'user' %}USER: {{ m.content }}{{ '\n' }}"
    "{% else %}ASSISTANT: {{ m.content }}{{ eos_token }}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
GENERATION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# A macro, a namespace, slices, tests and splits of what users wrote.
INTRICATE = """\
{%- macro say(role, text) -%}
{{- '<|im_start|>' ~ role }}
{{ text[:1] ~ text[1:] | trim }}<|im_end|>
{% endmacro -%}
{%- set ns = namespace(system='', said='') -%}
{%- for message in messages -%}
  {%- if message.role == 'system' -%}
    {%- set ns.system = ns.system + message.content.strip() -%}
  {%- else -%}
    {%- set content = message.content.split('</think>')[-1].lstrip('\\n') -%}
    {%- if '<|im_end|>' in content -%}{%- set ns.said = ns.said ~ '!' -%}{%- endif -%}
    {%- if content.startswith('</s>') -%}{%- set ns.said = ns.said ~ '?' -%}{%- endif -%}
    {%- set ns.said = ns.said + say(message.role, content | replace('a', 'b')) -%}
  {%- endif -%}
{%- endfor -%}
{%- if ns.system %}{{ say('system', ns.system) }}{% endif -%}
{{- ns.said -}}
{%- set parts = ['<|im_start|>', 'assistant'] -%}
{%- if add_generation_prompt %}{{ parts | join('') }}
{% endif -%}
"""
TOOLS = """\
{%- if tools %}<|im_start|>system
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}<|im_end|>
{% endif -%}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content or '' }}
{%- if message.tool_calls %}{% for call in message.tool_calls %}
<tool_call>
{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}{% endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}
"""
ALL = {
    "chatml": CHATML,
    "zephyr": ZEPHYR,
    "headers": HEADERS,
    "llama": LLAMA,
    "inst": INST,
    "vicuna": VICUNA,
    "generation": GENERATION,
    "intricate": INTRICATE,
    "tools": TOOLS,
}
