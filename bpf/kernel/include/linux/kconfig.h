/* SPDX-License-Identifier: GPL-2.0 */
#ifndef CONFIG_BPF_SYSCALL
#define CONFIG_BPF_SYSCALL 1
#endif
