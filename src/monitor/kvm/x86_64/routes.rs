//! Where KVM sends global system interrupts: to the pins of the interrupt controllers, as messages, and to Hyper-V's synthetic
//! interrupts.
//!
//! KVM takes the whole table at once (KVM_SET_GSI_ROUTING, Documentation/virt/kvm/api.rst, 4.52), so [`Routes`] has it.

use std::collections::BTreeMap;

use kvm_bindings::{
    KVM_IRQ_ROUTING_HV_SINT, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_hv_sint, kvm_irq_routing_irqchip,
    kvm_irq_routing_msi,
};

use crate::memory::layout;
use crate::vm::Msi;

/// Pins of the I/O APIC, which have the first numbers.
pub const PINS: u32 = layout::IO_APIC_PINS;
/// Pins of the two 8259s, and of one.
const PIC_PINS: u32 = 16;
const PIC: u32 = 8;

/// Where an interrupt goes that is no pin's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// Nowhere yet.
    Nowhere,
    /// To a local APIC, as a message.
    Msi(Msi),
    /// To a synthetic interrupt source (TLFS, SynIC): of which vCPU, and which of its 16.
    Sint {
        /// The vCPU's number.
        vcpu: u32,
        /// The source.
        sint: u32,
    },
}

/// All routes.
#[derive(Debug, Clone, Default)]
pub struct Routes {
    /// Those beside the pins of KVM's own controllers, by their global system interrupt.
    others: BTreeMap<u32, Route>,
    /// KVM has no controllers with pins: the first numbers, too, have routes like all others.
    split: bool,
}

impl Routes {
    /// As KVM begins: to the pins of its own controllers, or, if it is `split` from them, nowhere.
    pub fn new(split: bool) -> Self {
        Self { others: BTreeMap::new(), split }
    }

    /// Adds a route; gives its number.
    pub fn add(&mut self, route: Route) -> u32 {
        let taken = || self.others.range(PINS..).map(|(gsi, _)| *gsi);
        let free = (PINS..).zip(taken()).find(|(gsi, taken)| gsi != taken);
        let gsi = free.map_or(PINS + taken().count() as u32, |(gsi, _)| gsi);
        self.others.insert(gsi, route);
        gsi
    }

    /// Whether the pins are those of a controller outside KVM.
    pub fn is_split(&self) -> bool {
        self.split
    }

    /// Changes the route of `gsi`.
    pub fn set(&mut self, gsi: u32, route: Route) {
        self.others.insert(gsi, route);
    }

    /// Takes the route of `gsi` away.
    pub fn remove(&mut self, gsi: u32) {
        self.others.remove(&gsi);
    }

    /// The whole table.
    pub fn table(&self) -> Vec<kvm_irq_routing_entry> {
        let pin = |gsi, irqchip, pin| {
            let irqchip = kvm_irq_routing_irqchip { irqchip, pin };
            (gsi, KVM_IRQ_ROUTING_IRQCHIP, kvm_irq_routing_entry__bindgen_ty_1 { irqchip })
        };
        let pics = (0..PIC_PINS).map(|gsi| match gsi < PIC {
            true => pin(gsi, KVM_IRQCHIP_PIC_MASTER, gsi),
            false => pin(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - PIC),
        });
        let io_apic = (0..PINS).map(|gsi| pin(gsi, KVM_IRQCHIP_IOAPIC, gsi));
        let chips = pics.chain(io_apic).filter(|_| !self.split);
        let others = self.others.iter().filter_map(|(&gsi, route)| match *route {
            Route::Nowhere => None,
            Route::Msi(Msi { address, data }) => {
                let (address_lo, address_hi) = (address as u32, (address >> 32) as u32);
                let msi = kvm_irq_routing_msi { address_lo, address_hi, data, ..Default::default() };
                Some((gsi, KVM_IRQ_ROUTING_MSI, kvm_irq_routing_entry__bindgen_ty_1 { msi }))
            }
            Route::Sint { vcpu, sint } => {
                let hv_sint = kvm_irq_routing_hv_sint { vcpu, sint };
                Some((gsi, KVM_IRQ_ROUTING_HV_SINT, kvm_irq_routing_entry__bindgen_ty_1 { hv_sint }))
            }
        });
        chips
            .chain(others)
            .map(|(gsi, type_, u)| kvm_irq_routing_entry { gsi, type_, u, ..Default::default() })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_given_again_and_the_pins_stay() {
        let sint = |vcpu, sint| Route::Sint { vcpu, sint };
        let mut routes = Routes::default();
        let pins = routes.table();
        assert_eq!(pins.len(), 40);
        assert_eq!([sint(0, 2), Route::Nowhere, sint(1, 2)].map(|route| routes.add(route)), [24, 25, 26]);
        assert_eq!(routes.table().len(), 42, "one goes nowhere");
        routes.remove(25);
        assert_eq!(routes.add(Route::Msi(Msi { address: 0x1_fee0_0000, data: 0x4021 })), 25);
        let table = routes.table();
        assert_eq!(table.len(), 43);
        assert!(table[..40].iter().zip(&pins).all(|(a, b)| (a.gsi, a.type_) == (b.gsi, b.type_)));
        let (message, sint) = (&table[41], &table[42]);
        assert_eq!((message.gsi, message.type_), (25, KVM_IRQ_ROUTING_MSI));
        assert_eq!((sint.gsi, sint.type_), (26, KVM_IRQ_ROUTING_HV_SINT));
    }

    #[test]
    fn pins_of_ours_have_routes_like_all_others() {
        let message = Msi { address: 0xfee0_0000, data: 0x30 };
        let mut routes = Routes::new(true);
        assert!(routes.table().is_empty());
        routes.set(4, Route::Msi(message));
        assert_eq!([routes.add(Route::Nowhere), routes.add(Route::Msi(message))], [24, 25]);
        routes.set(4, Route::Nowhere);
        routes.set(9, Route::Msi(message));
        let table: Vec<_> = routes.table().iter().map(|entry| (entry.gsi, entry.type_)).collect();
        assert_eq!(table, [(9, KVM_IRQ_ROUTING_MSI), (25, KVM_IRQ_ROUTING_MSI)]);
    }
}
